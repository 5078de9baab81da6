"""Maintenance tasks of batches: find those that can advance, and advance them a step at a time."""

from tpo.batches.advance import BatchAdvancer
from tpo.broker import JobNotifier
from worker.guard import guarded

NOTIFY_BATCHES_SECONDS = 1.0
"""How often batches are looked for that can advance: the pause after which a batch's next jobs are created."""


class BatchTasks:
    """Runs steps of batches. What fails now, the next round repeats."""

    def __init__(self, advancer: BatchAdvancer, notifier: JobNotifier) -> None:
        self._advancer = advancer
        self._notifier = notifier

    def notify_due(self) -> None:
        """Notify the maintenance worker of batches that were not advanced recently."""
        with guarded("batches not notified"):
            for batch_id in self._advancer.due(NOTIFY_BATCHES_SECONDS / 2):
                self._notifier.notify_batch(batch_id)

    def advance(self, batch_id: str) -> None:
        """Take the next step of a batch, and notify again if another one can follow at once."""
        with guarded(f"{batch_id} not advanced"):
            if self._advancer.advance(batch_id):
                self._notifier.notify_batch(batch_id)
