"""A worker whose model call never returns and cannot be interrupted: `python -m tests.support.hanging_worker`.

With the argument `stuck`, the policy reports that it is unhealthy.
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
    """A policy whose calls hang."""

    healthy = True

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Wait and ignore interrupts."""
        self.healthy = "stuck" not in sys.argv
        threading.Event().wait()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Fail: the process exits without waiting for its thread."""
        raise AssertionError("unreachable: the process exits without waiting for its thread")


def main(settings: Settings, store: Store) -> int:
    """Run the worker and return its exit code."""
    return serve(settings, store, HangingPolicy(), ScriptedRewardModel())


if __name__ == "__main__":
    sys.exit(start(main))
