"""A worker whose policy is away for as long as it lives: `python -m tests.support.unavailable_worker`."""

import sys

from tpo.backends.scripted import ScriptedRewardModel
from tpo.core.errors import BackendUnavailableError
from tpo.core.ports import Generate, Generation, Interrupt
from tpo.settings import Settings
from tpo.store import Store
from worker.__main__ import serve
from worker.startup import start


class UnavailablePolicy:
    """A policy behind a server that answers 503."""

    healthy = True

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        raise BackendUnavailableError("The policy's server answered 503.")

    def close(self) -> None:
        """Nothing runs."""


def main(settings: Settings, store: Store) -> int:
    return serve(settings, store, UnavailablePolicy(), ScriptedRewardModel())


if __name__ == "__main__":
    sys.exit(start(main))
