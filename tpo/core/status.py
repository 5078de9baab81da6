"""The states of a job, for the server and its client alike."""

from typing import Literal

Status = Literal[
    "queued", "in_progress", "paused", "cancelling", "completed", "failed", "cancelled", "expired", "incomplete"
]
LIVE: tuple[Status, ...] = ("queued", "in_progress", "paused", "cancelling")
TERMINAL: tuple[Status, ...] = ("completed", "failed", "cancelled", "expired", "incomplete")
"""A job in one of these never changes again."""
HELD: tuple[Status, ...] = ("in_progress", "cancelling")
"""The states in which a worker holds the lease."""
