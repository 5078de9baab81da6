"""Futures that let a job's thread wait for a batch it shares with other jobs."""

from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tpo.core.ports import Interrupt

_POLL_SECONDS = 0.1

T = TypeVar("T")


def result_of(future: Future[T], interrupt: "Interrupt") -> T:
    """Wait for the future's result. Call `interrupt` several times a second; if it raises, cancel the future."""
    try:
        while not wait((future,), timeout=_POLL_SECONDS).done:
            interrupt()
    except BaseException:
        future.cancel()
        raise
    return future.result()


def succeed(future: Future[T], result: T) -> None:
    """Set the result, unless the future is already done or cancelled."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_result(result)


def fail(future: Future[T], error: Exception) -> None:
    """Set the exception, unless the future is already done or cancelled."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
