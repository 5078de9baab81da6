"""Rewards of other packages, found by the entry point group `tpo.rewards` (docs/rewards.md has one of 20 lines)."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from tpo.core.errors import ModelRefusedError
from tpo.core.ports import RewardModel

GROUP = "tpo.rewards"


def load(name: str, options: Mapping[str, Any]) -> RewardModel:
    """What that plug-in makes of its options: an object with `score(request, interrupt)`. Raises ModelRefusedError."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        there = ", ".join(sorted(found)) or "none"
        raise ModelRefusedError(
            f"No installed package offers the reward {name} (entry point group {GROUP}); there is {there}."
        )
    try:
        reward = found[name].load()(**options)
    except Exception as error:
        raise ModelRefusedError(f"The reward plug-in {name} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(getattr(reward, "score", None)):
        raise ModelRefusedError(
            f"The reward plug-in {name} made something that has no method score(request, interrupt)."
        )
    return reward  # type: ignore[no-any-return]
