"""Every contract test runs on SQLite, on PostgreSQL and through PgBouncer; engines for tests that concern one kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from testing.services import new_database
from tests.support.databases import DATABASES, POOLED, migrated_database
from tpo.db import connect

_POOLED_MODULES = {
    f"tests.contract.test_store{part}" for part in ("", "_claims", "_concurrency", "_idempotency", "_maintenance")
}
"""Together they run every kind of statement and lock; the others would only repeat them through PgBouncer."""
_LONG = {"test_job_invariants_hold_for_any_sequence"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the database of each test, which depends on its module."""
    if "migrated_url" in metafunc.fixturenames:
        pooled = metafunc.module.__name__ in _POOLED_MODULES and metafunc.function.__name__ not in _LONG
        metafunc.parametrize("migrated_url", [*DATABASES, *([POOLED] if pooled else [])], indirect=True)


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a database of each kind with the schema and no rows."""
    with migrated_database(request.param, request, tmp_path) as url:
        yield url


@pytest.fixture
def postgres(postgres_admin_url: str, postgres_template: str) -> Iterator[Engine]:
    """Yield an engine on a PostgreSQL database with the schema and no rows."""
    # `--fast` deselects tests by the fixture postgres_admin_url, so it is a parameter here.
    with new_database(postgres_admin_url, postgres_template) as url:
        engine = connect(url)
        yield engine
        engine.dispose()


@pytest.fixture
def sqlite(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """Yield an engine on an SQLite file with the schema and no rows."""
    with migrated_database("sqlite", request, tmp_path) as url:
        engine = connect(url)
        yield engine
        engine.dispose()
