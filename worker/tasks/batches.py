"""Maintenance task of batches: advance each batch that is due by one small step a round."""

import threading
import time

from tpo.batches.advance import BatchAdvancer
from worker.guard import guarded

ADVANCE_BATCHES_SECONDS = 1.0
"""How often batches are looked for that can advance: the pause after which a batch's next jobs are created."""

_ROUND_SECONDS = 2.0
"""A round ends after this time; the batches that it did not reach come first in the next one."""


class BatchTasks:
    """Advances batches in turn, so that a large one does not delay a small one."""

    def __init__(self, advancer: BatchAdvancer) -> None:
        self._advancer = advancer
        self._notified: dict[str, None] = {}
        self._lock = threading.Lock()

    def notify(self, batch_id: str) -> None:
        """Advance a batch in the next round, whether it is due or not."""
        with self._lock:
            self._notified[batch_id] = None

    def advance(self) -> bool:
        """Take the next step of each batch that is due. Returns whether another step can follow at once."""
        with self._lock:
            notified, self._notified = list(self._notified), {}
        with guarded("batches not found"):
            notified += self._advancer.due(ADVANCE_BATCHES_SECONDS / 2)
        end = time.monotonic() + _ROUND_SECONDS
        for batch_id in dict.fromkeys(notified):
            with guarded(f"{batch_id} not advanced"):
                if time.monotonic() >= end or self._advancer.advance(batch_id):
                    self.notify(batch_id)
        return bool(self._notified)
