"""Engines on a migrated database of one kind, for tests that concern only that kind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from testing.services import new_database
from tests.support.databases import migrated_database
from tpo.db import connect


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
