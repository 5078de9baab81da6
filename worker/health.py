"""For health checks: does a process of this host answer? `python -m worker.health worker` or `maintenance`."""

import platform
import sys

from kombu.exceptions import OperationalError

from tpo.broker import MAINTENANCE_QUEUE, unavailable
from tpo.settings import settings
from worker.celery.app import make_app

_SECONDS = 5.0


def answers(kind: str) -> bool:
    """Ask the processes of that kind on this host through the broker, as Flower does."""
    app = make_app(settings(), MAINTENANCE_QUEUE)
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=_SECONDS)
            inspect = app.control.inspect(
                pattern=f"tpo-{kind}-*@{platform.node()}",
                matcher="glob",
                timeout=_SECONDS,
                limit=1,
                connection=connection,
            )
            return bool(inspect.ping())
    except OperationalError as error:
        print(unavailable(error), file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(0 if answers(sys.argv[1]) else 1)
