"""Whether a model's loop goes on: a driver or an accelerator that hangs raises nothing."""

import time

STUCK_SECONDS = 600.0
"""One pass through a model that takes longer will never end."""


class Watchdog:
    """Tells a loop that works from one that is stuck: told when a pass begins, and when there is nothing to do."""

    _since: float | None = None

    def beat(self) -> None:
        """A pass begins."""
        self._since = time.monotonic()

    def rest(self) -> None:
        """Nothing is to be done."""
        self._since = None

    @property
    def stuck(self) -> bool:
        """Whether one pass has taken far too long."""
        since = self._since
        return since is not None and time.monotonic() - since > STUCK_SECONDS
