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


def connect(url: str, pool_size: int = 8, *, patient: bool = False) -> Engine:
    """Create an engine with a bounded pool, whose errors quote no values. It does not connect yet.

    On PostgreSQL, statements time out after some seconds, unless `patient`. Raises DatabaseRefusedError.
    """
    if _parse_url(url).get_backend_name() == "sqlite":
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
    """Parse a URL; check its driver's options, and create the folder of its file. Raises DatabaseRefusedError."""
    parsed = make_url(url)
    file = parsed.database
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
    if parsed.get_backend_name() == "sqlite" and file and file != ":memory:":
        folder = Path(file).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"TPO_DATABASE_URL: the folder {folder} cannot be made: {error.strerror}."
            raise DatabaseRefusedError(why) from None
    return parsed
