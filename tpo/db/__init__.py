"""Connections, sessions and the clock of the database, for SQLite and PostgreSQL."""

from tpo.db.base import DEFAULT_TENANT, Base, insert_if_new
from tpo.db.clock import now
from tpo.db.engine import connect
from tpo.db.group_commit import write
from tpo.db.queries import Queries
from tpo.db.sessions import asking, reading, writing

__all__ = [
    "DEFAULT_TENANT",
    "Base",
    "Queries",
    "asking",
    "connect",
    "insert_if_new",
    "now",
    "reading",
    "write",
    "writing",
]
