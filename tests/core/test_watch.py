"""The watch for a silent consumer: messages wait, a thread is free, and none arrives."""

import contextlib
from collections.abc import Callable

from tpo.core.errors import BrokerUnavailableError
from worker.celery.consumer_watch import ConsumerWatch

CHECKS = 6


def checks(consumer: ConsumerWatch, times: int = CHECKS, between: Callable[[], object] = lambda: None) -> list[bool]:
    """Check the consumer repeatedly, and return whether it was silent each time."""
    found = []
    for _ in range(times):
        between()
        found.append(consumer.is_silent())
    return found


def test_consumer_is_silent_when_messages_wait_and_none_arrives() -> None:
    assert checks(ConsumerWatch(2, lambda: 1)) == [False] * (CHECKS - 1) + [True]


def test_consumer_is_not_silent_when_queue_is_empty() -> None:
    assert not any(checks(ConsumerWatch(2, lambda: 0), 3 * CHECKS))


def test_consumer_is_not_silent_while_messages_arrive() -> None:
    consumer = ConsumerWatch(2, lambda: 1)
    task = consumer.track(lambda _job_id: None)
    assert not any(checks(consumer, 3 * CHECKS, lambda: task("job")))


def test_consumer_is_not_silent_while_all_threads_are_busy() -> None:
    consumer = ConsumerWatch(1, lambda: 1)
    seen: list[bool] = []
    consumer.track(lambda: seen.extend(checks(consumer, 3 * CHECKS)))()
    assert not any(seen)
    assert checks(consumer, CHECKS + 1)[-1]


def test_consumer_is_not_silent_when_broker_is_unavailable() -> None:
    counts = [1] * (CHECKS - 1) + [None] + [1] * (CHECKS - 1)

    def waiting() -> int:
        count = counts.pop(0)
        if count is None:
            raise BrokerUnavailableError()
        return count

    assert not any(checks(ConsumerWatch(1, waiting), len(counts)))


def test_failed_task_frees_its_thread() -> None:
    consumer = ConsumerWatch(1, lambda: 1)

    def fails() -> None:
        raise ValueError

    with contextlib.suppress(ValueError):
        consumer.track(fails)()
    assert checks(consumer, CHECKS + 1)[-1]
