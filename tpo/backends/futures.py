"""How a job's thread waits for a batch it shares with others."""

from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tpo.core.ports import Interrupt

_SLICE = 0.1

T = TypeVar("T")


def result_of(future: Future[T], interrupt: "Interrupt") -> T:
    """The future's result. Asks `interrupt` several times a second; what it raises cancels the future."""
    try:
        while not wait((future,), timeout=_SLICE).done:
            interrupt()
    except BaseException:
        future.cancel()
        raise
    return future.result()


def succeed(future: Future[T], result: T) -> None:
    """Give the result, unless nobody waits for it any more."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_result(result)


def fail(future: Future[T], error: Exception) -> None:
    """Give the error, unless nobody waits any more."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
