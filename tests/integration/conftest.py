"""Fixtures of the integration suite: systems of a database, a broker and real processes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.processes import System, running_system


@pytest.fixture
def system(migrated_url: str, tmp_path: Path) -> Iterator[System]:
    """System on SQLite and on PostgreSQL, without any process."""
    with running_system(migrated_url, tmp_path) as system:
        yield system


@pytest.fixture
def sqlite_system(sqlite_template: Path, tmp_path: Path) -> Iterator[System]:
    """System on SQLite, for tests that do not depend on the database."""
    shutil.copy(sqlite_template, tmp_path / "tpo.db")
    with running_system(f"sqlite:///{tmp_path}/tpo.db", tmp_path) as system:
        yield system
