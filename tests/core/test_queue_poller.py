"""The queue poller: jobs are taken from the database while no message arrives, within the worker's slots."""

import threading
from collections.abc import Callable

from testing.waiting import HANG_SECONDS, eventually
from tpo.core.errors import StoreUnavailableError
from worker.celery.consumer_watch import ConsumerWatch
from worker.drain import Drain
from worker.queue_poller import QueuePoller


class Queue:
    """A queue of jobs that all run until they are allowed to end."""

    def __init__(self, jobs: int) -> None:
        self.waiting = jobs
        self.ended = 0
        self.running = 0
        self.peak = 0
        self.may_end = threading.Event()
        self.notified: list[str] = []
        self._lock = threading.Lock()

    def next_waiting(self) -> str | None:
        return "job_1" if self.waiting else None

    def run(self, another_waits: Callable[[], None]) -> str | None:
        with self._lock:
            if not self.waiting:
                return None
            self.waiting -= 1
            self.running += 1
            self.peak = max(self.peak, self.running)
        if self.waiting:
            another_waits()
        assert self.may_end.wait(HANG_SECONDS)
        with self._lock:
            self.running -= 1
            self.ended += 1
        return "job_1"


def poller_of(consumer: ConsumerWatch, queue: Queue) -> QueuePoller:
    return QueuePoller(consumer, Drain(), queue.next_waiting, queue.run, queue.notified.append, silent_seconds=1)


def test_poller_fills_all_slots_and_no_more() -> None:
    consumer, queue = ConsumerWatch(3, lambda: 0), Queue(10)
    poller = poller_of(consumer, queue)
    poller.check()
    eventually(lambda: queue.running == 3, why="all slots are busy")
    poller.check()
    received: list[str] = []
    consumer.track(received.append)("job")
    assert received == [], "a message must not exceed the slots"
    queue.may_end.set()
    eventually(lambda: queue.ended == 10, why="all jobs have ended")
    assert queue.peak == 3
    poller.check()  # the message that arrived above
    poller.check()
    assert queue.notified == ["job_1"] * 3, "a message shows whether the consumer works, also after the last job"
    eventually(lambda: all(consumer.reserve_slot() for _ in range(3)), why="all slots are free again")


def test_poller_waits_while_messages_arrive() -> None:
    consumer, queue = ConsumerWatch(3, lambda: 0), Queue(1)
    poller = poller_of(consumer, queue)
    queue.may_end.set()
    for _ in range(5):
        consumer.track(lambda _job: None)("job")
        poller.check()
    assert (queue.waiting, queue.running) == (1, 0)
    poller.check()
    eventually(lambda: queue.ended == 1, why="the job is polled once messages stop")


def test_poller_survives_unavailable_database() -> None:
    consumer, queue = ConsumerWatch(1, lambda: 0), Queue(1)

    def unavailable() -> str | None:
        raise StoreUnavailableError()

    QueuePoller(consumer, Drain(), unavailable, queue.run, queue.notified.append, silent_seconds=1).check()
    assert consumer.reserve_slot()
