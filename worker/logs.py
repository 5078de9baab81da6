"""Logs: one format, and never a text of a user. An error is logged by its type and its frames, not by its message."""

import logging

from celery.signals import setup_logging

log = logging.getLogger("tpo.worker")


def configure() -> None:
    """Send every log line of this process to stderr in one format."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    setup_logging.connect(_configured)
    # Our own lines tell of each job; these would say the same again, and less of it.
    for name in ("celery.worker.strategy", "celery.app.trace", "celery.beat", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _configured(**_kwargs: object) -> None:
    """Takes the place of Celery's own configuration of logging."""
