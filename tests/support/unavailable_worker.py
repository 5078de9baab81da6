"""A worker whose policy is never available: `python -m tests.support.unavailable_worker`."""

import sys

from tpo.backends.scripted import ScriptedRewardModel
from tpo.core.errors import BackendUnavailableError
from tpo.core.ports import Generate, Generation, Interrupt
from tpo.settings import Settings
from tpo.store import Store
from worker.__main__ import serve
from worker.startup import start


class UnavailablePolicy:
    """A policy whose server always answers 503."""

    healthy = True

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Raise BackendUnavailableError."""
        raise BackendUnavailableError("The policy's server answered 503.")

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def main(settings: Settings, store: Store) -> int:
    """Run the worker and return its exit code."""
    return serve(settings, store, UnavailablePolicy(), ScriptedRewardModel())


if __name__ == "__main__":
    sys.exit(start(main))
