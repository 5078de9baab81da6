"""Exponential back-off with jitter."""

import random


def backoff_seconds(attempt: int, *, first: float = 1.0, factor: float = 2.0, longest: float = 60.0) -> float:
    """Return the seconds to wait after failed attempt `attempt` (0 is the first), with jitter of up to a half."""
    delay = min(first * factor ** min(attempt, 64), longest)
    return delay * random.uniform(0.5, 1)  # noqa: S311 - jitter, not a secret
