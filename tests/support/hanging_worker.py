"""A worker whose model call never returns and cannot be interrupted: `python -m tests.support.hanging_worker`.

With the word `stuck`, the policy knows that it hangs.
"""

import sys
import threading

from tpo.backends.scripted import ScriptedRewardModel
from tpo.core.ports import Generate, Generation, Interrupt
from tpo.settings import Settings
from tpo.store import Store
from worker.__main__ import serve
from worker.startup import start


class HangingPolicy:
    """A policy that is stuck."""

    healthy = True

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        self.healthy = "stuck" not in sys.argv
        threading.Event().wait()
        raise AssertionError("unreachable")

    def close(self) -> None:
        raise AssertionError("unreachable: the process leaves its thread behind")


def main(settings: Settings, store: Store) -> int:
    return serve(settings, store, HangingPolicy(), ScriptedRewardModel())


if __name__ == "__main__":
    sys.exit(start(main))
