"""Transactions through PgBouncer in transaction mode have their limits, and leave no state in the server."""

from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import text

from testing.jobs import SERVES, claim, create
from testing.services import new_database, pgbouncer_server, through_pgbouncer
from tests.support import selection
from tpo.core.errors import StoreUnavailableError
from tpo.db import connect, reading, schema, single_query, writing
from tpo.jobs.outcomes import Outcome
from tpo.store import Store

_LIMITS = "SELECT current_setting('statement_timeout'), current_setting('lock_timeout')"


@pytest.fixture(scope="module", params=["options ignored", "options refused"])
def pooled_url(request: pytest.FixtureRequest, postgres_admin_url: str, postgres_template: str) -> Iterator[str]:
    """Yield the URL of a migrated database behind a PgBouncer that ignores or refuses startup options."""
    with (
        selection.shared_server(),
        pgbouncer_server(postgres_admin_url, ignore_options=request.param == "options ignored") as folder,
        new_database(postgres_admin_url, postgres_template) as url,
    ):
        yield through_pgbouncer(url, folder)


def test_limits_hold_in_each_transaction_and_leave_no_state(pooled_url: str) -> None:
    engine = connect(pooled_url)
    for session_of in (reading, writing):
        with session_of(engine) as session:
            assert session.execute(text(_LIMITS)).one() == ("10s", "8s")
    with single_query(engine) as connection:  # through the same server connection, outside of any transaction
        assert connection.execute(text(_LIMITS)).one() == ("0", "0")
    engine.dispose()


def test_slow_statement_is_ended_by_the_server(pooled_url: str) -> None:
    engine = connect(pooled_url)

    def sleep() -> None:
        with writing(engine) as session:
            session.execute(text("SET LOCAL statement_timeout = 50"))
            session.execute(text("SELECT pg_sleep(60)"))

    with pytest.raises(StoreUnavailableError):
        sleep()
    Store(engine).ping()
    engine.dispose()


def test_no_statement_is_prepared(pooled_url: str) -> None:
    engine = connect(pooled_url)
    store = Store(engine)
    for _ in range(8):  # psycopg would prepare each statement at its sixth execution
        lease, _ = claim(store, create(store))
        assert store.leases.finish(lease, Outcome("completed")) == "completed"
        assert store.leases.claim("worker", 30, **SERVES) is None
    with writing(engine) as session:
        assert session.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0
    engine.dispose()


def test_direct_connection_keeps_limits_in_its_session(postgres_admin_url: str) -> None:
    engine = connect(postgres_admin_url.replace("postgresql:", "postgresql+psycopg:", 1))
    with single_query(engine) as connection:
        assert connection.execute(text(_LIMITS)).one() == ("10s", "8s")
    engine.dispose()


def test_migration_runs_through_pgbouncer(postgres_admin_url: str, pgbouncer_folder: str) -> None:
    with new_database(postgres_admin_url) as url:
        schema.upgrade(through_pgbouncer(url, pgbouncer_folder))
        with psycopg.connect(url.replace("+psycopg", "", 1)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            assert row == (schema.newest_revision(),)
