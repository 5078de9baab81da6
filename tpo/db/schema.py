"""Migrate a database to the schema of this version, and check its schema. The steps are in `migrations`."""

import logging
import re
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, event, inspect, text

from tpo.core.errors import SchemaOutOfDateError
from tpo.db.engine import connect
from tpo.db.sessions import reading, writing

if TYPE_CHECKING:
    from alembic.config import Config

_LOCK = 0x74706F  # "tpo" in ASCII: any number that nothing else locks in the same database

logging.getLogger("alembic").setLevel(logging.WARNING)  # at INFO it logs every connection


def upgrade(url: str) -> None:
    """Migrate the database to the schema of this version, all or nothing. Safe to repeat, and to run concurrently.

    Raises SchemaOutOfDateError if a newer version created the database, and StoreUnavailableError.
    """
    from alembic import command

    _migrate(url, lambda config: command.upgrade(config, "head"))


def downgrade(url: str, revision: str) -> None:
    """Downgrade the schema to an earlier revision ("base" for none). Data that it cannot hold is lost."""
    from alembic import command

    _migrate(url, lambda config: command.downgrade(config, revision))


def check(engine: Engine) -> None:
    """Raise SchemaOutOfDateError unless the database has the schema of this version.

    Every process calls this when it starts, so it avoids Alembic, which is slow to import.
    """
    with reading(engine) as session:
        exists = inspect(session.connection()).has_table("alembic_version")
        current = session.scalars(text("SELECT version_num FROM alembic_version")).all() if exists else []
    if list(current) != [newest_revision()]:
        shown = ", ".join(current) or "none"
        raise SchemaOutOfDateError(
            f"The database has schema {shown}, this version needs {newest_revision()}: run `tpo db upgrade`."
        )


def newest_revision() -> str:
    """Return the revision that this version needs; each file of `migrations/versions` begins with its own."""
    names = (file.name for file in (files("migrations") / "versions").iterdir())
    return max(match[1] for name in names if (match := re.match(r"(\d{4})_\w+\.py$", name)))


def _migrate(url: str, step: "Callable[[Config], None]") -> None:
    from alembic.util import CommandError

    engine = connect(url, pool_size=1, patient=True, create=True)  # an index on millions of rows takes minutes
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _without_foreign_keys)
    try:
        with writing(engine) as session:
            connection = session.connection()
            _lock_migrations(connection)
            step(_config(connection))
    except CommandError as error:
        raise SchemaOutOfDateError(
            f"The database's schema cannot be changed to that of this version: {error}"
        ) from error
    finally:
        engine.dispose()


def _lock_migrations(connection: Connection) -> None:
    """Serialise migrations. On SQLite the transaction already holds the only write lock."""
    if connection.dialect.name == "postgresql":
        # An index on millions of jobs takes minutes, and other migrations wait as long.
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def _without_foreign_keys(connection: Any, _record: Any) -> None:
    # SQLite alters a table by building a new one and dropping the old one, which would delete referring rows.
    connection.execute("PRAGMA foreign_keys = OFF")


def _config(connection: Connection) -> "Config":
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    return config
