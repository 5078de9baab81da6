"""Batches: a job for each row of an iterable, with bounded concurrency and a result or an error for each row."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tpo.client.errors import ClientError
from tpo.client.types import Job

Row = TypeVar("Row")
Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Result(Generic[Row]):
    """The result of one row: its `output`, or an `error`. `job` is None if it could not be submitted."""

    index: int
    row: Row
    job: Job | None
    error: ClientError | None

    @property
    def output(self) -> str | None:
        """The answer; for a job that stopped early, its best answer so far."""
        return self.job["output"] if self.job else None


def map_concurrently(
    items: Iterable[Item],
    work: Callable[[Item, threading.Event], Value],
    *,
    concurrency: int,
    in_order: bool,
) -> Iterator[Value]:
    """Iterate over the results of `work` for each item, which runs in up to `concurrency` threads.

    An item is read only when a thread is free for it. Errors of `work` are raised here. `work` also gets an event,
    which is set when the caller stops iterating: calls that still run should then end soon.
    """
    if concurrency < 1:
        raise ValueError("in_flight must be at least 1")
    abandoned = threading.Event()
    running: list[Future[Value]] = []
    source = iter(items)
    exhausted = False
    try:
        while True:
            while not exhausted and len(running) < concurrency:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                else:
                    running.append(_in_thread(work, item, abandoned))
            if not running:
                return
            done = running[0] if in_order else next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            result = done.result()
            running.remove(done)
            yield result
    finally:
        abandoned.set()


def _in_thread(work: Callable[..., Value], *arguments: Any) -> "Future[Value]":
    """Run a function in a daemon thread, which does not keep the program alive while it waits for a response."""
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # raised by result()
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
