"""Engines for SQLite and PostgreSQL."""

import sqlite3
import threading
import warnings
from collections import deque
from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import SAWarning

from tpo.core.errors import DatabaseRefusedError
from tpo.db.sqlite import BUSY_SECONDS, PENDING_WRITES, WRITE_LOCK, begin, check_same_file, prepare_connection


def connect(url: str, pool_size: int = 8, *, patient: bool = False, create: bool = False) -> Engine:
    """Create an engine with a bounded pool, whose errors quote no values. It does not connect yet.

    On PostgreSQL, statements time out after some seconds, unless `patient`. A SQLite database that does not exist is
    created only with `create`. Raises DatabaseRefusedError.
    """
    parsed = _parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed, create=create)
        engine = create_engine(
            url,
            pool_size=pool_size,
            hide_parameters=True,
            connect_args={"timeout": BUSY_SECONDS},
            execution_options={WRITE_LOCK: threading.Lock(), PENDING_WRITES: deque()},
        )
        event.listen(engine, "connect", prepare_connection)
        event.listen(engine, "checkout", check_same_file)
        event.listen(engine, "begin", begin)
        return engine
    from tpo.db import postgresql

    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=4,
        pool_timeout=10,
        hide_parameters=True,
        connect_args=postgresql.CONNECTION,
    )
    if patient:
        event.listen(engine, "do_connect", postgresql.open_without_limits)
    else:
        event.listen(engine, "do_connect", postgresql.opener_with_limits())
        event.listen(engine, "begin", postgresql.set_limits)
    event.listen(engine, "checkout", postgresql.check_connected)
    return engine


def _parse_url(url: str) -> URL:
    """Parse a URL and check its driver's options. Raises DatabaseRefusedError."""
    parsed = make_url(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SAWarning)  # SQLAlchemy only warns of unknown options
            _, options = parsed.get_dialect()().create_connect_args(parsed)
        if parsed.get_backend_name() == "sqlite":
            sqlite3.connect(":memory:", **options).close()
        else:
            from tpo.db import postgresql

            postgresql.check_options(options)
    except (SAWarning, TypeError, ValueError, sqlite3.Error):
        unknown = ", ".join(sorted(parsed.query)) or "its parts"
        raise DatabaseRefusedError(f"TPO_DATABASE_URL: the driver refuses {unknown}; correct or remove it.") from None
    return parsed


def _check_file(url: URL, *, create: bool) -> None:
    """Check that the file of a SQLite database exists, or create its folder, which only its owner can read.

    Raises DatabaseRefusedError.
    """
    if url.database in (None, "", ":memory:") or "uri" in url.query:
        return
    file = Path(str(url.database))
    if not create:
        if not file.exists():
            raise DatabaseRefusedError(
                f"TPO_DATABASE_URL: there is no database {file.absolute()}. Change to the folder in which `tpo up` was "
                "started, or name another file; `tpo db upgrade` creates a new one."
            )
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        why = f"TPO_DATABASE_URL: the folder {file.parent} cannot be created: {error.strerror}."
        raise DatabaseRefusedError(why) from None
