"""What the parts of the store share: one database, and the tenant for whom clients ask."""

from sqlalchemy import Engine

from tpo.jobs.tables import DEFAULT_TENANT


class Bound:
    """Queries bound to a database and a tenant."""

    def __init__(self, engine: Engine, tenant: str = DEFAULT_TENANT) -> None:
        self._engine = engine
        self.tenant = tenant
