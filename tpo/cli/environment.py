"""Settings and store for the commands. An error in the environment becomes one line, not a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tpo.cli.ui.output import USAGE, Failure

if TYPE_CHECKING:
    from tpo.settings import Settings
    from tpo.store import Store


def read_settings(**overrides: Any) -> "Settings":
    """Read the settings from the environment; options of the command line override them. Raises Failure."""
    from pydantic import ValidationError

    from tpo.settings import Settings, format_errors

    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise Failure(format_errors(error), USAGE) from None


@contextmanager
def open_store() -> Iterator["Store"]:
    """Open the store in the database of TPO_DATABASE_URL. Raises SchemaOutOfDateError."""
    from tpo.db import connect, schema
    from tpo.store import Store

    engine = connect(read_settings().database_url.get_secret_value(), pool_size=1)
    try:
        schema.check(engine)
        yield Store(engine)
    finally:
        engine.dispose()
