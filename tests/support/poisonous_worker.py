"""A worker whose policy kills its process, as the kernel does without memory, when a prompt contains POISON."""

import os
import signal
import sys

from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.core.ports import Generate, Generation, Interrupt
from tpo.settings import Settings
from tpo.store import Store
from worker.__main__ import serve
from worker.startup import start

POISON = "Poison."


class PoisonousPolicy(ScriptedPolicy):
    """The scripted policy, killed by one prompt."""

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """Generate, or die at the end of the call."""
        generation = super().generate(request, interrupt)
        if any(POISON in message.content for message in request.messages):
            os.kill(os.getpid(), signal.SIGKILL)
        return generation


def main(settings: Settings, store: Store) -> int:
    """Serve with the poisonous policy."""
    policy = PoisonousPolicy(settings.scripted_latency, settings.scripted_log)
    return serve(settings, store, policy, ScriptedRewardModel(settings.scripted_latency, settings.scripted_log))


if __name__ == "__main__":
    sys.exit(start(main))
