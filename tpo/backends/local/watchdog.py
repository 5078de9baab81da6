"""Watchdog for a hung forward pass: a driver or an accelerator that hangs raises no error."""

import time

STUCK_SECONDS = 600.0
"""A forward pass that takes longer is considered hung."""


class Watchdog:
    """Detects a stuck loop. The loop calls `beat` when a pass begins and `rest` when it is idle."""

    _since: float | None = None

    def beat(self) -> None:
        """Record that a pass begins."""
        self._since = time.monotonic()

    def rest(self) -> None:
        """Record that the loop is idle."""
        self._since = None

    @property
    def stuck(self) -> bool:
        """Whether the current pass has taken longer than STUCK_SECONDS."""
        since = self._since
        return since is not None and time.monotonic() - since > STUCK_SECONDS
