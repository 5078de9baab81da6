"""An API with handlers that never end: `python -m tests.support.hanging_api`."""

import sys
import threading
import time

import api.__main__
from api.app import create_app
from tests.support.worker_harness import SECRET


def _hang_thread(text: str) -> None:
    threading.Event().wait(timeout=float(len(text)) * 1e6)


async def _hang_loop(text: str) -> None:
    time.sleep(len(text) * 1e6)


def main() -> int:
    """Run the API with two more routes, and return its exit code."""

    def with_hanging_routes(*arguments: object) -> object:
        app = create_app(*arguments)  # type: ignore[arg-type]
        app.get("/hang/thread")(lambda: _hang_thread(SECRET))

        async def hang_loop() -> None:
            await _hang_loop(SECRET)

        app.get("/hang/loop")(hang_loop)
        return app

    setattr(api.__main__, "create_app", with_hanging_routes)  # noqa: B010
    return api.__main__.main()


if __name__ == "__main__":
    sys.exit(main())
