"""Compile each SQL statement once for all engines of a test process.

Each test has its own database and engine, and SQLAlchemy caches compiled statements by engine. Without a shared cache,
a third of the time of such a test would go into compiling the same statements again.
"""

from collections import defaultdict
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.util import LRUCache

import tpo.db.engine

_STATEMENTS = 2000
_caches: defaultdict[type, LRUCache[Any, Any]] = defaultdict(lambda: LRUCache(_STATEMENTS))


def share_compiled_statements() -> None:
    """Share the statement caches of all engines that the product creates from now on, by kind of database."""
    names = vars(tpo.db.engine)
    create = names["create_engine"]

    def create_with_shared_cache(*args: Any, **kwargs: Any) -> Engine:
        engine: Engine = create(*args, **kwargs)
        engine._compiled_cache = _caches[type(engine.dialect)]
        return engine

    names["create_engine"] = create_with_shared_cache
    # The dialect is part of the cache key, so dialects of one kind must compare equal.
    DefaultDialect.__eq__ = lambda self, other: type(self) is type(other)  # type: ignore[method-assign]
    DefaultDialect.__hash__ = lambda self: hash(type(self))  # type: ignore[method-assign]
