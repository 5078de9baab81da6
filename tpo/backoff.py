"""How long to wait before another attempt."""

import random


def backoff_seconds(attempt: int, *, first: float = 1.0, factor: float = 2.0, longest: float = 60.0) -> float:
    """Return the pause after so many failed attempts (0 is the first): exponential, with jitter of up to a half."""
    grown = min(first * factor ** min(attempt, 64), longest)
    return grown * random.uniform(0.5, 1)  # noqa: S311 - jitter, not a secret
