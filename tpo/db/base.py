"""The base of all tables, and what their definitions and inserts share."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import JSON, Double, Index, Text, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Session

DEFAULT_TENANT = "default"
"""The tenant of a server without keys, and of the key in the settings."""


def partial_index(name: str, *columns: str, where: str) -> Index:
    """Define a partial index, which stays small however many jobs have ended or wait."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


class Base(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, float: Double, str: Text}  # noqa: RUF012


_INSERT: dict[str, Callable[[type[Base]], postgresql.Insert | sqlite.Insert]] = {
    "sqlite": sqlite.insert,
    "postgresql": postgresql.insert,
}


def insert_if_new(session: Session, table: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """Build an INSERT that does nothing if the row exists."""
    return _INSERT[session.get_bind().dialect.name](table).on_conflict_do_nothing()
