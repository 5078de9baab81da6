"""Detect a full disk under the database before a write fails."""

import os
import secrets
from pathlib import Path

from sqlalchemy import Engine, text

from tpo.core.errors import StoreUnavailableError
from tpo.db.failures import DISK_FULL
from tpo.db.sessions import writing

MIN_FREE_BYTES = 32 * 1024 * 1024
"""With less than this, SQLite's write-ahead log may not grow by one busy minute."""
_PROBE_BYTES = 64 * 1024


def is_disk_full(engine: Engine) -> bool:
    """Return whether the disk that holds the database is full.

    On SQLite, ask the file system. A PostgreSQL may be on another machine: there, let a temporary table grow by some
    pages, and roll back. Raises StoreUnavailableError if the database does not answer.
    """
    if engine.dialect.name == "sqlite":
        try:
            disk = os.statvfs(Path(engine.url.database or "").absolute().parent)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize < MIN_FREE_BYTES
    try:
        with writing(engine) as session:
            session.execute(text("CREATE TEMPORARY TABLE tpo_disk_probe (data text STORAGE EXTERNAL) ON COMMIT DROP"))
            session.execute(
                text("INSERT INTO tpo_disk_probe VALUES (:data)"), {"data": secrets.token_hex(_PROBE_BYTES)}
            )
            session.rollback()
    except StoreUnavailableError as error:
        if str(error) == DISK_FULL:
            return True
        raise
    return False
