"""All numbers that determine the result of the training, and the folders that it writes to."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = FOLDER / "models"
WORK = FOLDER / "work"
"""Checkpoints of a running training; not committed."""

SEED = 1


@dataclass(frozen=True)
class Architecture:
    """The shape of both models: a small Llama."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 512
    positions: int = 512


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rates of one training.

    The learning rates rise over `warmup` steps. From `decay_from` on they fall so that they would be zero at
    `decay_to`. Over the last `cooldown` steps they fall to zero at `steps`, if that is sooner.
    """

    steps: int
    warmup: int
    decay_from: int
    decay_to: int
    cooldown: int
    adam_rate: float
    muon_rate: float

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates at a step."""
        decay = (self.decay_to - step) / (self.decay_to - self.decay_from)
        return min(1.0, (step + 1) / self.warmup, decay, (self.steps - step) / self.cooldown)


ARCHITECTURE = Architecture()
POLICY = Schedule(steps=1900, warmup=60, decay_from=1000, decay_to=2200, cooldown=250, adam_rate=4e-3, muon_rate=0.02)
TOKENS_A_BATCH = 1024
BATCHES_A_STEP = 3
LATE_STEP = 1400
SNAPSHOT_STEP = 600
"""The reward model starts from the policy of this step, which already copies facts."""

REWARD = Schedule(steps=3000, warmup=40, decay_from=1600, decay_to=3000, cooldown=100, adam_rate=1e-3, muon_rate=0.01)
REPEATS_STEP = 1000
"""From this step on the reward model also learns about repeats: if it learns them earlier, it fails to learn facts."""

CHECKPOINT_EVERY = 200
