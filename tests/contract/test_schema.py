"""The migrations, on both databases: declared tables, upgrade and downgrade, and concurrent upgrades."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from testing.jobs import create
from tpo.core.errors import SchemaOutOfDateError, StoreUnavailableError
from tpo.db import Base, connect, schema
from tpo.store import Store

TABLES = {
    *("jobs", "iterations", "candidates", "calls", "events", "workers", "tenants", "api_keys", "idempotency_keys"),
    *(
        "files",
        "file_parts",
        "batches",
        "batch_lines",
        "webhooks",
        "deliveries",
        "job_metadata",
        "queues",
        "last_claims",
    ),
}


def test_migrations_upgrade_and_downgrade_twice(database_url: str) -> None:
    engine = connect(database_url, create=True)
    for _ in range(2):
        schema.upgrade(database_url)
        schema.upgrade(database_url)
        schema.check(engine)
        assert set(inspect(engine).get_table_names()) == TABLES | {"alembic_version"}
        schema.downgrade(database_url, "base")
        assert inspect(engine).get_table_names() == ["alembic_version"]
        with engine.connect() as connection:
            leftovers = {
                "sqlite": "SELECT count(*) FROM sqlite_master WHERE type IN ('trigger', 'view')",
                "postgresql": "SELECT count(*) FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace"
                " WHERE n.nspname = 'public'",
            }[engine.dialect.name]
            assert connection.scalar(text(leftovers)) == 0
    engine.dispose()


def test_migrations_build_declared_tables(database_url: str) -> None:
    schema.upgrade(database_url)
    engine = connect(database_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        statuses = [c["sqltext"] for c in inspect(connection).get_check_constraints("jobs")]
        assert len(statuses) == 1
        assert all(f"'{s}'" in statuses[0] for s in ("queued", "paused", "incomplete"))
    engine.dispose()


def test_newest_revision_is_alembic_head() -> None:
    folder = Path(schema.__file__).parents[2] / "migrations"
    assert ScriptDirectory(str(folder)).get_heads() == [schema.newest_revision()]


def test_check_names_found_revision_and_remedy(database_url: str) -> None:
    engine = connect(database_url, create=True)
    with pytest.raises(SchemaOutOfDateError, match=r"has schema none.*tpo db upgrade"):
        schema.check(engine)
    schema.upgrade(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaOutOfDateError, match="9999"):
        schema.check(engine)
    with pytest.raises(SchemaOutOfDateError, match="9999"):
        schema.upgrade(database_url)
    engine.dispose()


def test_concurrent_upgrades_succeed(database_url: str) -> None:
    barrier = threading.Barrier(6)

    def upgrade(_: int) -> None:
        barrier.wait()
        schema.upgrade(database_url)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(upgrade, range(6)))
    engine = connect(database_url)
    schema.check(engine)
    engine.dispose()


def test_upgrade_waits_for_other_writer_of_new_file(tmp_path: Path) -> None:
    file = tmp_path / "tpo.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as other, ThreadPoolExecutor(1) as threads:
        other.execute("BEGIN IMMEDIATE")  # the file has no write-ahead log yet
        upgraded = threads.submit(schema.upgrade, f"sqlite:///{file}")
        with pytest.raises(TimeoutError):
            upgraded.result(0.5)
        other.execute("COMMIT")
        upgraded.result()


def test_unreachable_database_is_reported() -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"
    with pytest.raises(StoreUnavailableError):
        schema.upgrade(url)
    engine = connect(url)
    with pytest.raises(StoreUnavailableError):
        schema.check(engine)
    engine.dispose()


def test_terminal_status_never_changes(migrated_url: str) -> None:
    engine = connect(migrated_url)
    create(Store(engine))
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET status = 'failed'"))
    with pytest.raises(IntegrityError, match="a terminal status never changes"), engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET status = 'queued'"))
    engine.dispose()
