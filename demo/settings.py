"""Every number that decides what the training gives, and the folders it writes to."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
MODELS = FOLDER / "models"
WORK = FOLDER / "work"
"""Checkpoints of a training under way; not committed."""

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
    """Steps of one training. The learning rates rise over `warmup` steps; from `decay_from` on they fall so that they
    would be zero at `decay_to`; over the last `cooldown` steps they fall to zero at `steps`, if that is sooner."""

    steps: int
    warmup: int
    decay_from: int
    decay_to: int
    cooldown: int
    adam_rate: float
    muon_rate: float

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with at a step."""
        decay = (self.decay_to - step) / (self.decay_to - self.decay_from)
        return min(1.0, (step + 1) / self.warmup, decay, (self.steps - step) / self.cooldown)


ARCHITECTURE = Architecture()
POLICY = Schedule(steps=1900, warmup=60, decay_from=1000, decay_to=2200, cooldown=250, adam_rate=4e-3, muon_rate=0.02)
TOKENS_A_BATCH = 1024
BATCHES_A_STEP = 3
LATE_STEP = 1400
SNAPSHOT_STEP = 600
"""The policy of this step becomes the reward model's start: it copies facts already."""

REWARD = Schedule(steps=3000, warmup=40, decay_from=1600, decay_to=3000, cooldown=100, adam_rate=1e-3, muon_rate=0.01)
REPEATS_STEP = 1000
"""From here on the reward model learns about repeats too: learned together with facts, they kept it from the facts."""

CHECKPOINT_EVERY = 200
