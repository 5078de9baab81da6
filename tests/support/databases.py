"""Databases with the schema, copied from a template that each test process builds once by the migrations."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.services import new_database, through_pgbouncer

DATABASES = ("sqlite", "postgresql")
POOLED = "postgresql-pgbouncer"
"""PostgreSQL through a PgBouncer in transaction mode."""


@contextlib.contextmanager
def migrated_database(kind: str, request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """Yield the URL of a database with the schema and no rows. An SQLite file is created in the folder."""
    if kind == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), folder / "tpo.db")
        yield f"sqlite:///{folder}/tpo.db"
        return
    template = request.getfixturevalue("postgres_template")
    with new_database(request.getfixturevalue("postgres_admin_url"), template) as url:
        if kind == POOLED:
            url = through_pgbouncer(url, request.getfixturevalue("pgbouncer_folder"))
        yield url
