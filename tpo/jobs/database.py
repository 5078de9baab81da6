"""The engine for SQLite and PostgreSQL, the database's clock, and sessions whose failures have our names."""

import os
import sqlite3
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import URL, Connection, Double, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError, SAWarning
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from tpo.errors import DatabaseRefused, StoreUnavailable, causes

Done = TypeVar("Done")

_BUSY_SECONDS = 15


class now(FunctionElement[float]):  # noqa: N801 - it is used as an SQL function
    """Unix seconds by the database's clock: the one clock that all processes share."""

    type = Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    # Not clock_timestamp(): it may differ from row to row, so that no index could be searched with it.
    return "extract(epoch from statement_timestamp())::double precision"


def connect(url: str, pool_size: int = 8, *, patient: bool = False) -> Engine:
    """An engine with a bounded pool, whose errors quote no values. Nothing is connected yet. Raises DatabaseRefused.

    No statement takes longer than some seconds, but with `patient`, where it takes as long as it takes.
    """
    if _checked(url).get_backend_name() == "sqlite":
        engine = create_engine(
            url,
            pool_size=pool_size,
            hide_parameters=True,
            connect_args={"timeout": _BUSY_SECONDS},
            execution_options={_TURN: threading.Lock(), _WAITING: deque()},
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "checkout", _still_the_same_file)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    from tpo.jobs import postgresql

    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=4,
        pool_timeout=10,
        hide_parameters=True,
        connect_args=postgresql.CONNECTION,
    )
    event.listen(engine, "do_connect", postgresql.open_connection if patient else postgresql.open_impatiently)
    event.listen(engine, "checkout", postgresql.check_connected)
    return engine


def _checked(url: str) -> URL:
    """The parsed URL: the driver knows its options, and the folder of a file is there. Raises DatabaseRefused."""
    parsed = make_url(url)
    file = parsed.database
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SAWarning)  # SQLAlchemy leaves out what it does not know, with a warning
            _, options = parsed.get_dialect()().create_connect_args(parsed)
        if parsed.get_backend_name() == "sqlite":
            sqlite3.connect(":memory:", **options).close()
        else:
            from tpo.jobs import postgresql

            postgresql.check_options(options)
    except (SAWarning, TypeError, ValueError, sqlite3.Error):
        unknown = ", ".join(sorted(parsed.query)) or "its parts"
        raise DatabaseRefused(f"TPO_DATABASE_URL: the driver refuses {unknown}; mend or remove it.") from None
    if parsed.get_backend_name() == "sqlite" and file and file != ":memory:":
        folder = Path(file).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"TPO_DATABASE_URL: the folder {folder} cannot be made: {error.strerror}."
            raise DatabaseRefused(why) from None
    return parsed


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # this module says BEGIN, not the driver
    _log_ahead(connection)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Turn to write-ahead logging, which a file keeps. Where others do so too, SQLite itself does not wait for them."""
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _still_the_same_file(connection: Any, record: Any, _proxy: Any) -> None:
    """Connect anew where the file was moved or removed: SQLite would go on writing where nobody looks again."""
    file = connection.execute("PRAGMA database_list").fetchone()[2]
    seen = _identity(file)
    if record.info.setdefault("file", seen) != seen:
        raise DisconnectionError("The database's file was replaced.")


def _identity(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once: one that reads first and upgrades later fails with "database is locked".
    if begin := connection.get_execution_options().get(_BEGIN, "BEGIN IMMEDIATE"):
        connection.exec_driver_sql(begin)


_BEGIN = "tpo_begin"
_TURN = "tpo_turn"
_WAITING = "tpo_waiting"
_CANNOT_WRITE = "The database can only be read: it is a standby, or set to be read-only."
_TOO_MANY = "The database takes no more connections: raise max_connections, or run fewer processes."
_DISK_FULL = "The disk that holds the database is full."
_REASONS: dict[int | str, str] = {
    sqlite3.SQLITE_BUSY: "Another process keeps the database's file locked.",
    sqlite3.SQLITE_CANTOPEN: "The database's file cannot be opened: is it there, and may this user write there?",
    sqlite3.SQLITE_FULL: _DISK_FULL,
    sqlite3.SQLITE_IOERR: "The disk that holds the database fails.",
    sqlite3.SQLITE_READONLY: "The database can only be read: may this user write to its file and folder?",
    "0A000": _CANNOT_WRITE,  # what a standby answers to a transaction that is to write
    "25006": _CANNOT_WRITE,
    "42501": "The database's user may not do that: let it own the schema and its tables.",
    "53100": _DISK_FULL,
    "53300": _TOO_MANY,
}
"""By SQLite's code or PostgreSQL's SQLSTATE: what hinders the database now, and may pass."""
_NOT_LET_IN = {
    "too many": _TOO_MANY,
    "remaining connection slots": _TOO_MANY,
    "authentication failed": "The database refuses the user or password of TPO_DATABASE_URL.",
    "pg_hba.conf": "The database refuses this user from this machine (pg_hba.conf).",
    "does not exist": "The database's server has no such user or database as TPO_DATABASE_URL names.",
}
"""The same where a connection is refused: there, the driver tells no SQLSTATE, and a server in English says it."""
_DAMAGED = "The database's file is damaged, or is no SQLite database: restore it, or name another file."
_JOIN: Literal["create_savepoint"] = "create_savepoint"
_READS: dict[str, dict[str, Any]] = {
    "sqlite": {_BEGIN: "BEGIN"},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
_ASKS: dict[str, dict[str, Any]] = {"sqlite": {_BEGIN: ""}, "postgresql": {"isolation_level": "AUTOCOMMIT"}}


@contextmanager
def asking(engine: Engine) -> Iterator[Connection]:
    """A connection for one query, which needs no transaction for that. Raises StoreUnavailable."""
    with _translated(), engine.connect().execution_options(**_ASKS[engine.dialect.name]) as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A session that only reads, all of it from one snapshot. Raises StoreUnavailable."""
    with (
        _translated(),
        engine.connect().execution_options(**_READS[engine.dialect.name]) as connection,
        Session(connection, expire_on_commit=False) as session,
    ):
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """A session that commits at its end and rolls back on any error. Raises StoreUnavailable."""
    with _translated(), _turn(engine), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


def write(engine: Engine, work: Callable[[Session], Done]) -> Done:
    """Do some work in a transaction, and give what it gives. Raises StoreUnavailable, and what the work raises.

    What several threads write to SQLite at once is committed together, for each commit waits for the disk; each piece
    of work stands or falls alone all the same.
    """
    waiting: deque[_Work] | None = engine.get_execution_options().get(_WAITING)
    if waiting is None:
        with writing(engine) as session:
            return work(session)
    mine = _Work(work)
    waiting.append(mine)
    with _translated():
        try:
            with _turn(engine):
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


@contextmanager
def _turn(engine: Engine) -> Iterator[None]:
    """The place of the one thread of a process that may write to SQLite, which itself lets waiters sleep and poll."""
    turn: threading.Lock | None = engine.get_execution_options().get(_TURN)
    if turn is None:
        yield
    elif not turn.acquire(timeout=_BUSY_SECONDS):
        raise StoreUnavailable()
    else:
        try:
            yield
        finally:
            turn.release()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        raise StoreUnavailable() from error
    except DBAPIError as error:
        why = _reason(error)
        if why or isinstance(error, OperationalError) or error.connection_invalidated:
            raise StoreUnavailable(why) from error
        if getattr(error.orig, "sqlite_errorcode", None) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise DatabaseRefused(_DAMAGED) from error
        raise


def _reason(error: DBAPIError) -> str | None:
    """Why the database does not do what it was asked, in our own words: its own may quote texts and passwords."""
    for cause in causes(error):  # where SQLite has ended the transaction itself, the rollback fails in its turn
        if isinstance(cause, sqlite3.Error):
            why = _REASONS.get(cause.sqlite_errorcode & 0xFF)  # above that, a code says more than we do
        elif hasattr(cause, "sqlstate") and cause.sqlstate is None:  # of the driver, which got no answer
            why = next((why for part, why in _NOT_LET_IN.items() if part in str(cause)), None)
        else:
            why = _REASONS.get(getattr(cause, "sqlstate", None) or "")
        if why:
            return why
    return None
