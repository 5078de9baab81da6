"""Common start of every process: read the settings and connect to the database, or fail with one line."""

import os
import platform
import secrets
import sys
import time
from collections.abc import Callable

from pydantic import ValidationError

from tpo.core.errors import DatabaseRefusedError, ModelRefusedError, SchemaOutOfDateError, StoreUnavailableError
from tpo.db import connect
from tpo.db.schema import check
from tpo.settings import Settings, format_errors
from tpo.store import Store
from worker import logs
from worker.drain import exit_on_signals
from worker.logs import log

_RETRY_SECONDS = 1.0


def start(serve: Callable[[Settings, Store], int]) -> int:
    """Call `serve` with the settings of the environment and a database of the right schema.

    Returns the exit code: 2 for invalid settings, 1 if the database, a model or the schema is refused.
    """
    logs.configure()
    exit_on_signals()
    try:
        settings = Settings()
        return serve(settings, _store(settings))
    except ValidationError as error:
        print(format_errors(error), file=sys.stderr)
        return 2
    except (DatabaseRefusedError, ModelRefusedError, SchemaOutOfDateError) as error:
        print(error, file=sys.stderr)
        return 1


def node_name(kind: str) -> str:
    """Return this process's name in Flower and in the table of workers.

    No other process ever has it: in a container, the next process has the same id and host.
    """
    return f"tpo-{kind}-{os.getpid()}-{secrets.token_hex(3)}@{platform.node()}"


def _store(settings: Settings) -> Store:
    engine = connect(settings.database_url.get_secret_value())
    while True:
        try:
            check(engine)
            return Store(engine)
        except DatabaseRefusedError:
            raise
        except StoreUnavailableError as error:
            log.warning("trying again: %s", error)
            time.sleep(_RETRY_SECONDS)
