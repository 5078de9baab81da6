"""Rewards from other packages, found through the entry point group `tpo.rewards` (example in docs/rewards.md)."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from tpo.core.errors import ModelRefusedError
from tpo.core.ports import RewardModel

GROUP = "tpo.rewards"


def load(name: str, options: Mapping[str, Any]) -> RewardModel:
    """Create a plug-in's reward from its options; the reward has a method `score(request, interrupt)`.

    Raises ModelRefusedError if no package provides the plug-in, if creating it fails, or if `score` is missing.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        available = ", ".join(sorted(found)) or "none"
        raise ModelRefusedError(
            f"No installed package offers the reward {name} (entry point group {GROUP}). Installed: {available}."
        )
    try:
        reward = found[name].load()(**options)
    except Exception as error:
        raise ModelRefusedError(
            f"The reward plug-in {name} cannot be created: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(reward, "score", None)):
        raise ModelRefusedError(
            f"The reward plug-in {name} created an object that has no method score(request, interrupt)."
        )
    return reward  # type: ignore[no-any-return]
