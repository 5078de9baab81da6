"""The statuses of a job, shared by the server and its client."""

from typing import Literal

Status = Literal[
    "queued", "in_progress", "paused", "cancelling", "completed", "failed", "cancelled", "expired", "incomplete"
]
LIVE: tuple[Status, ...] = ("queued", "in_progress", "paused", "cancelling")
"""The statuses of a job that has not ended."""
TERMINAL: tuple[Status, ...] = ("completed", "failed", "cancelled", "expired", "incomplete")
"""The statuses of a job that has ended. It never changes again."""
HELD: tuple[Status, ...] = ("in_progress", "cancelling")
"""The statuses in which a worker holds the lease."""
