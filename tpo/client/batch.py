"""Many jobs, a bounded number of them at once: from any iterable, each with its own result or its own error."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tpo.client.errors import ClientError
from tpo.client.types import Job

Row = TypeVar("Row")
Item = TypeVar("Item")
Given = TypeVar("Given")


@dataclass(frozen=True)
class Result(Generic[Row]):
    """What came of one row: `output` where it went well, `error` where not. `job` is there once it was submitted."""

    index: int
    row: Row
    job: Job | None
    error: ClientError | None

    @property
    def output(self) -> str | None:
        """The answer; of a job that stopped early, the best that it had."""
        return self.job["output"] if self.job else None


def flow(
    items: Iterable[Item],
    work: Callable[[Item, threading.Event], Given],
    *,
    at_once: int,
    in_order: bool,
) -> Iterator[Given]:
    """What `work` makes of each item, `at_once` of them at a time, each in a thread of its own.

    An item is drawn only when there is room for it. What `work` raises is raised here. Whoever stops listening sets
    the event that `work` is given: what still runs should end soon.
    """
    if at_once < 1:
        raise ValueError("at_once must be at least 1")
    left = threading.Event()
    running: list[Future[Given]] = []
    source = iter(items)
    more = True
    try:
        while True:
            while more and len(running) < at_once:
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                else:
                    running.append(_in_thread(work, item, left))
            if not running:
                return
            done = running[0] if in_order else next(iter(wait(running, return_when=FIRST_COMPLETED).done))
            result = done.result()
            running.remove(done)
            yield result
    finally:
        left.set()


def _in_thread(work: Callable[..., Given], *arguments: Any) -> "Future[Given]":
    """A daemon thread: one that waits for an answer must not keep the program from its end."""
    future: Future[Given] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:  # told to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
