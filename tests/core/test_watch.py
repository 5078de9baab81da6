"""When a consumer is taken for silent."""

import contextlib
from collections.abc import Callable

from tpo.core.errors import BrokerUnavailableError
from worker.celery.consumer_watch import Consumer

LOOKS = 6


def looks(consumer: Consumer, times: int = LOOKS, between: Callable[[], object] = lambda: None) -> list[bool]:
    found = []
    for _ in range(times):
        between()
        found.append(consumer.is_silent())
    return found


def test_consumer_is_silent_when_messages_wait_and_none_arrives() -> None:
    assert looks(Consumer(2, lambda: 1)) == [False] * (LOOKS - 1) + [True]


def test_consumer_is_not_silent_when_queue_is_empty() -> None:
    assert not any(looks(Consumer(2, lambda: 0), 3 * LOOKS))


def test_consumer_is_not_silent_while_messages_arrive() -> None:
    consumer = Consumer(2, lambda: 1)
    task = consumer.track(lambda _job_id: None)
    assert not any(looks(consumer, 3 * LOOKS, lambda: task("job")))


def test_consumer_is_not_silent_while_all_threads_are_busy() -> None:
    consumer = Consumer(1, lambda: 1)
    seen: list[bool] = []
    consumer.track(lambda: seen.extend(looks(consumer, 3 * LOOKS)))()
    assert not any(seen)
    assert looks(consumer, LOOKS + 1)[-1]


def test_consumer_is_not_silent_when_broker_is_unavailable() -> None:
    answers = [1] * (LOOKS - 1) + [None] + [1] * (LOOKS - 1)

    def waiting() -> int:
        answer = answers.pop(0)
        if answer is None:
            raise BrokerUnavailableError()
        return answer

    assert not any(looks(Consumer(1, waiting), len(answers)))


def test_failed_task_frees_its_thread() -> None:
    consumer = Consumer(1, lambda: 1)

    def fails() -> None:
        raise ValueError

    with contextlib.suppress(ValueError):
        consumer.track(fails)()
    assert looks(consumer, LOOKS + 1)[-1]
