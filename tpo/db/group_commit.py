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
    """Do some work in a transaction, and give what it gives. Raises StoreUnavailableError, and what the work raises.

    What several threads write to SQLite at once is committed together, for each commit waits for the disk; each piece
    of work stands or falls alone all the same.
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
    """What one thread wants to have written."""

    def __init__(self, work: Callable[[Session], Any]) -> None:
        super().__init__()
        self.work = work


def _write_together(engine: Engine, group: list[_Work]) -> None:
    """Do all of it in one transaction, each in a savepoint of its own; nobody is told of success before the commit."""
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
                except Exception as error:  # of the work, or of what its session had held back until here
                    found.append(partial(each.set_exception, error))
                else:
                    found.append(partial(each.set_result, result))
    except BaseException as error:  # whatever it is: the others wait for an answer
        found = [partial(each.set_exception, error) for each in group]
    for tell in found:
        tell()
