"""Logs in one format, never with a user's text. An error is logged by its type and stack frames, not its message."""

import logging

from celery.signals import setup_logging

log = logging.getLogger("tpo.worker")


def configure() -> None:
    """Send every log line of this process to stderr in one format."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    setup_logging.connect(_configured)
    logging.getLogger("kombu.pidbox").setLevel(logging.CRITICAL)  # anyone with the broker could fill it with tracebacks
    # Our own lines cover each job; these loggers would repeat them with less detail. httpcore would log the hosts of
    # webhooks and the headers of their responses.
    for name in ("celery.worker.strategy", "celery.app.trace", "celery.beat", "alembic", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _configured(**_kwargs: object) -> None:
    """Replace Celery's own configuration of logging."""
