"""The base of the parts of the store: one database and one tenant."""

from sqlalchemy import Engine

from tpo.db.base import DEFAULT_TENANT


class Queries:
    """Queries bound to a database and a tenant."""

    def __init__(self, engine: Engine, tenant: str = DEFAULT_TENANT) -> None:
        self._engine = engine
        self.tenant = tenant
