"""Group commit: writes of several threads to SQLite share one transaction."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from tpo.db.failures import translate_errors
from tpo.db.sessions import writing
from tpo.db.sqlite import PENDING_WRITES, write_lock

Done = TypeVar("Done")
_JOIN: Literal["create_savepoint"] = "create_savepoint"


def write(engine: Engine, work: Callable[[Session], Done]) -> Done:
    """Do some work in a transaction and return its result. Raises StoreUnavailableError, and what the work raises.

    On SQLite, concurrent writes of several threads share one commit, because each commit waits for the disk. A failed
    piece of work is rolled back without the others.
    """
    waiting: deque[_Work] | None = engine.get_execution_options().get(PENDING_WRITES)
    if waiting is None:
        with writing(engine) as session:
            return work(session)
    mine = _Work(work)
    waiting.append(mine)
    with translate_errors():
        try:
            with write_lock(engine):
                if not mine.done():
                    _write_together(engine, [waiting.popleft() for _ in range(len(waiting))])
        finally:
            with suppress(ValueError):
                waiting.remove(mine)
        found: Done = mine.result()
        return found


class _Work(Future[Any]):
    """One thread's work, waiting to be committed."""

    def __init__(self, work: Callable[[Session], Any]) -> None:
        super().__init__()
        self.work = work


def _write_together(engine: Engine, group: list[_Work]) -> None:
    """Do all work in one transaction, each piece in its own savepoint; publish results only after the commit."""
    found: list[Callable[[], None]] = []
    try:
        with engine.begin() as connection:
            for each in group:
                try:
                    with (
                        Session(connection, expire_on_commit=False, join_transaction_mode=_JOIN) as session,
                        session.begin(),
                    ):
                        result = each.work(session)
                except OperationalError:
                    raise  # the database fails, not the work: nothing of the group is written
                except Exception as error:  # raised by the work, or by what its session flushed at its end
                    found.append(partial(each.set_exception, error))
                else:
                    found.append(partial(each.set_result, result))
    except BaseException as error:  # whatever it is: the other threads wait for an answer
        found = [partial(each.set_exception, error) for each in group]
    for tell in found:
        tell()
