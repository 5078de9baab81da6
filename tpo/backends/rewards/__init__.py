"""Combined rewards from a TOML file: reward models, judges, lengths, patterns, schemas and plug-ins."""

from tpo.backends.rewards.combined import CombinedReward, load_combined

__all__ = ["CombinedReward", "load_combined"]
