"""What every process does first: read the environment, find the database, or say in one line why not."""

import os
import platform
import sys
import time
from collections.abc import Callable

from pydantic import ValidationError

from tpo.core.errors import DatabaseRefusedError, ModelRefusedError, SchemaOutOfDateError, StoreUnavailableError
from tpo.db import connect
from tpo.db.schema import check
from tpo.settings import Settings, explained
from tpo.store import Store
from worker import logs
from worker.drain import exit_on_signals
from worker.logs import log

_ASK_AGAIN_SECONDS = 1.0


def start(serve: Callable[[Settings, Store], int]) -> int:
    """Serve with the settings of the environment and a database of the right schema. Gives the exit code."""
    logs.configure()
    exit_on_signals()
    try:
        settings = Settings()
        return serve(settings, _store(settings))
    except ValidationError as error:
        print(explained(error), file=sys.stderr)
        return 2
    except (DatabaseRefusedError, ModelRefusedError, SchemaOutOfDateError) as error:
        print(error, file=sys.stderr)
        return 1


def node_name(kind: str) -> str:
    """The name under which Flower and the table of workers show this process."""
    return f"tpo-{kind}-{os.getpid()}@{platform.node()}"


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
            time.sleep(_ASK_AGAIN_SECONDS)
