"""Rewards that are made of parts: reward models, judges, lengths, patterns, schemas and plug-ins, by a TOML file."""

from tpo.backends.rewards.combined import CombinedReward, load_combined

__all__ = ["CombinedReward", "load_combined"]
