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

Result = TypeVar("Result")
_JOIN: Literal["create_savepoint"] = "create_savepoint"


def write(engine: Engine, work: Callable[[Session], Result]) -> Result:
    """Run `work` in a transaction and return its result. Raises StoreUnavailableError, and what `work` raises.

    On SQLite, concurrent writes of several threads share one commit, because each commit waits for the disk. Work that
    fails is rolled back without the others.
    """
    waiting: deque[_Work] | None = engine.get_execution_options().get(PENDING_WRITES)
    if waiting is None:
        with writing(engine) as session:
            return work(session)
    own = _Work(work)
    waiting.append(own)
    with translate_errors():
        try:
            with write_lock(engine):
                if not own.done():
                    _write_group(engine, [waiting.popleft() for _ in range(len(waiting))])
        finally:
            with suppress(ValueError):
                waiting.remove(own)
        result: Result = own.result()
        return result


class _Work(Future[Any]):
    """One thread's work, which waits to be committed."""

    def __init__(self, work: Callable[[Session], Any]) -> None:
        super().__init__()
        self.work = work


def _write_group(engine: Engine, group: list[_Work]) -> None:
    """Run all work in one transaction, each in its own savepoint; publish the results only after the commit."""
    outcomes: list[Callable[[], None]] = []
    try:
        with engine.begin() as connection:
            for item in group:
                try:
                    with (
                        Session(connection, expire_on_commit=False, join_transaction_mode=_JOIN) as session,
                        session.begin(),
                    ):
                        result = item.work(session)
                except OperationalError:
                    raise  # the database failed, not the work: nothing of the group is written
                except Exception as error:  # raised by the work, or by what its session flushed at its end
                    outcomes.append(partial(item.set_exception, error))
                else:
                    outcomes.append(partial(item.set_result, result))
    except BaseException as error:  # of any kind, because the other threads wait for a result
        outcomes = [partial(item.set_exception, error) for item in group]
    for publish in outcomes:
        publish()
