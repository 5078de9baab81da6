"""Watchdog for a hung forward pass: a driver or an accelerator that hangs raises no error."""

import time

TIMEOUT_SECONDS = 600.0
"""A forward pass that takes longer is considered hung."""


class Watchdog:
    """Detects a hung loop. The loop calls `arm` when a pass begins and `disarm` when it is idle."""

    _armed_at: float | None = None

    def arm(self) -> None:
        """Start the timeout: a pass begins."""
        self._armed_at = time.monotonic()

    def disarm(self) -> None:
        """Stop the timeout: the loop is idle."""
        self._armed_at = None

    @property
    def expired(self) -> bool:
        """True when the current pass has taken longer than TIMEOUT_SECONDS."""
        armed_at = self._armed_at
        return armed_at is not None and time.monotonic() - armed_at > TIMEOUT_SECONDS
