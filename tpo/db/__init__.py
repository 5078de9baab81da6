"""Connections, sessions and the clock of the database, for SQLite and PostgreSQL."""

from tpo.db.base import DEFAULT_TENANT, Base, insert_if_new
from tpo.db.clock import now
from tpo.db.disk import is_disk_full
from tpo.db.engine import connect
from tpo.db.failures import is_driver_error
from tpo.db.group_commit import write
from tpo.db.ids import id_at, new_id
from tpo.db.queries import Queries
from tpo.db.sessions import reading, single_query, writing

__all__ = [
    "DEFAULT_TENANT",
    "Base",
    "Queries",
    "connect",
    "id_at",
    "insert_if_new",
    "is_disk_full",
    "is_driver_error",
    "new_id",
    "now",
    "reading",
    "single_query",
    "write",
    "writing",
]
