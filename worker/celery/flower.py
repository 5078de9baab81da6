"""Flower, the live view of the workers: `python -m worker.celery.flower`.

Flower sees Celery's messages, which hold a job's id and nothing else. It is read-only. With a password set, only the
health check answers without it. The password never appears in the process list.
"""

import logging
import signal
import sys
from typing import Any

import tornado.ioloop
from flower.app import Flower
from flower.options import options
from flower.urls import settings
from flower.views.monitor import Metrics
from pydantic import ValidationError
from tornado.httputil import HTTPServerRequest
from tornado.web import ErrorHandler, authenticated

from tpo.broker import MAINTENANCE_QUEUE
from tpo.origins import is_foreign, is_host_allowed
from tpo.settings import Settings, format_errors
from tpo.settings import settings as read_settings
from tpo.signals import stop_signals
from worker import logs
from worker.celery.app import make_app

_MAX_TASKS = 10_000
_PURGE_OFFLINE_SECONDS = 600
_HEALTH = "/healthcheck"


class _GuardedMetrics(Metrics):  # type: ignore[misc]
    """Flower's metrics, which Flower itself serves without its password; here they need it."""

    @authenticated
    async def get(self) -> None:
        await super().get()


class _GuardedFlower(Flower):  # type: ignore[misc]
    """Flower that answers to its own names only, and to no web page of another origin that asks for a change."""

    configured: Settings

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Return the handler of a request, or of its refusal."""
        configured = self.configured
        if request.path != _HEALTH:  # probes ask by address
            host = request.headers.get("Host", "")
            if not is_host_allowed(host, configured.flower_host, configured.allowed_hosts):
                return self.get_handler_delegate(request, ErrorHandler, {"status_code": 421})
            headers = {name.lower(): value for name, value in request.headers.items()}
            if is_foreign(request.method or "", headers, ()):
                return self.get_handler_delegate(request, ErrorHandler, {"status_code": 403})
        return super().find_handler(request, **kwargs)


def make_flower(configured: Settings) -> Flower:
    """Return a Flower configured by these settings, not yet started."""
    options.address = configured.flower_host
    options.port = configured.flower_port
    options.read_only = True
    options.max_tasks = _MAX_TASKS
    options.purge_offline_workers = _PURGE_OFFLINE_SECONDS
    auth = configured.flower_basic_auth
    options.basic_auth = [auth.get_secret_value()] if auth else []
    app = make_app(configured, MAINTENANCE_QUEUE)
    view = _GuardedFlower(capp=app, options=options, **settings)
    view.configured = configured
    view.add_handlers(".*", [(r"/metrics", _GuardedMetrics)])
    return view


def main() -> int:
    """Serve until a stop signal arrives, and return the exit code."""
    logs.configure()
    try:
        configured = read_settings()
    except ValidationError as error:
        print(format_errors(error), file=sys.stderr)
        return 2
    logging.getLogger("tornado.access").setLevel(logging.WARNING)
    view = make_flower(configured)

    def stop(_number: int, _frame: object) -> None:
        tornado.ioloop.IOLoop.current().add_callback_from_signal(view.stop)

    for number in stop_signals():
        signal.signal(number, stop)
    try:
        view.start_http_server()
    except OSError as error:
        logs.log.error("Flower cannot listen on port %d: %s", options.port, error.strerror)
        return 1
    logs.log.info("Flower listens on http://%s:%d", options.address, options.port)
    view.start()
    return 0


if __name__ == "__main__":
    sys.exit(main())
