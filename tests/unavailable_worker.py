"""A worker whose policy is away for as long as it lives: `python -m tests.unavailable_worker`."""

import sys

from tpo.backends.scripted import ScriptedRewardModel
from tpo.errors import BackendUnavailable
from tpo.jobs.store import Store
from tpo.ports import Generate, Generation, Interrupt
from tpo.settings import Settings
from worker.__main__ import serve
from worker.start import start


class UnavailablePolicy:
    """A policy behind a server that answers 503."""

    healthy = True

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        raise BackendUnavailable("The policy's server answered 503.")

    def close(self) -> None:
        """Nothing runs."""


def main(settings: Settings, store: Store) -> int:
    return serve(settings, store, UnavailablePolicy(), ScriptedRewardModel())


if __name__ == "__main__":
    sys.exit(start(main))
