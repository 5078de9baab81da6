"""Wait for events instead of sleeping, and give up only if something hangs."""

import time
from collections.abc import Callable
from typing import TypeVar

HANG_SECONDS = 300.0
"""Time after which a process, a response or an event is considered hung.

No time limit in a test may be shorter: a busy machine suspends a process for seconds and slows it down tenfold.
"""

Found = TypeVar("Found")


def eventually(check: Callable[[], Found | None], *, why: str) -> Found:
    """Call `check` until its result is truthy, and return that. Fails after HANG_SECONDS, with `why` in the message."""
    end = time.monotonic() + HANG_SECONDS
    while not (found := check()):
        assert time.monotonic() < end, f"not within {HANG_SECONDS:.0f} s: {why}"
        time.sleep(0.01)
    return found
