"""Health check of the processes of this host: `python -m worker.health worker` or `maintenance`.

Exits with 0 if one of them answers, else with 1.
"""

import platform
import sys

from kombu.exceptions import OperationalError

from tpo.broker import MAINTENANCE_QUEUE, unavailable
from tpo.settings import settings
from worker.celery.app import make_app

_TIMEOUT_SECONDS = 5.0


def is_answering(kind: str) -> bool:
    """Ping this host's processes of a kind through the broker, as Flower does. Returns True if one answers."""
    app = make_app(settings(), MAINTENANCE_QUEUE)
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=_TIMEOUT_SECONDS)
            inspect = app.control.inspect(
                pattern=f"tpo-{kind}-*@{platform.node()}",
                matcher="glob",
                timeout=_TIMEOUT_SECONDS,
                limit=1,
                connection=connection,
            )
            return bool(inspect.ping())
    except OperationalError as error:
        print(unavailable(error), file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(0 if is_answering(sys.argv[1]) else 1)
