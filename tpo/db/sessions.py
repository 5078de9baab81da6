"""Sessions that read from one snapshot, sessions that commit, and connections for a single query."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from tpo.db.failures import translate_errors
from tpo.db.sqlite import BEGIN, write_lock

_READS: dict[str, dict[str, Any]] = {
    "sqlite": {BEGIN: "BEGIN"},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
_ASKS: dict[str, dict[str, Any]] = {"sqlite": {BEGIN: ""}, "postgresql": {"isolation_level": "AUTOCOMMIT"}}


@contextmanager
def single_query(engine: Engine) -> Iterator[Connection]:
    """Open a connection for a single query, which needs no transaction. Raises StoreUnavailableError."""
    with translate_errors(), engine.connect().execution_options(**_ASKS[engine.dialect.name]) as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """Open a session that reads from one snapshot. Raises StoreUnavailableError."""
    with (
        translate_errors(),
        engine.connect().execution_options(**_READS[engine.dialect.name]) as connection,
        Session(connection, expire_on_commit=False) as session,
    ):
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """Open a session that commits at its end and rolls back on any error. Raises StoreUnavailableError."""
    with translate_errors(), write_lock(engine), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session
