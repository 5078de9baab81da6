"""Wait for events instead of sleeping, and give up only where something hangs."""

import time
from collections.abc import Callable
from typing import TypeVar

HANG_SECONDS = 300.0
"""After so long a process, an answer or an event is taken not to come at all.

No bound of a test on time may be shorter: a busy machine stops a process for seconds, and slows it down tenfold.
"""

Found = TypeVar("Found")


def eventually(look: Callable[[], Found | None], *, why: str) -> Found:
    """Return what `look` gives as soon as that is something; fail when it never does."""
    end = time.monotonic() + HANG_SECONDS
    while not (found := look()):
        assert time.monotonic() < end, f"not within {HANG_SECONDS:.0f} s: {why}"
        time.sleep(0.01)
    return found
