"""The FastAPI application: shared state, routes, documentation."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

import tpo
from api import errors
from api.metrics import Metrics
from api.middleware import RequestMiddleware
from api.openapi.document import openapi_document
from api.routes import batches, chat_completions, events, files, health, job_actions, jobs, models, responses, webhooks
from api.streaming.broadcaster import EventBroadcaster
from tpo.broker import JobNotifier
from tpo.core.errors import DatabaseRefusedError, StoreUnavailableError
from tpo.db import connect, schema
from tpo.settings import Settings
from tpo.settings import settings as environment
from tpo.store import Store

logger = logging.getLogger("api")

_DESCRIPTION = """
Test-Time Preference Optimization: the policy improves its answer under a reward model over several iterations, and
every step is recorded. Submit a job, poll it until its `status` is terminal, then read its `output`.

Every error is `application/problem+json` (RFC 9457) with an additional `error` object {message, type, code, param}, as
in OpenAI's API. Every response has the header `x-request-id`.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """Create the application for these settings. Default: the settings of the environment."""
    settings = settings or environment()
    # The page /docs loads nothing from other servers: it works offline, and no third party sees its readers.
    app = FastAPIOffline(
        title="TPO",
        version=tpo.__version__,
        description=_DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.settings = settings
    app.state.metrics = Metrics()
    app.add_middleware(RequestMiddleware, settings=settings)
    errors.install(app)
    ours = (jobs.router, job_actions.router, events.router, webhooks.router, models.router, health.router)
    for router in (*ours, responses.router, chat_completions.router, files.router, batches.router):
        app.include_router(router)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the database and the broker while the server runs. Raises DatabaseRefusedError, SchemaOutOfDateError."""
    settings: Settings = app.state.settings
    engine = connect(settings.database_url.get_secret_value())
    notifier = JobNotifier(settings.broker_url.get_secret_value())
    try:
        schema.check(engine)
    except DatabaseRefusedError:
        raise
    except StoreUnavailableError as error:
        logger.warning("requests get 503 until the database is available: %s", error)
    app.state.store = Store(engine)
    app.state.notifier = notifier
    app.state.disk_probe = health.DiskProbe(engine)
    broadcaster = EventBroadcaster(app.state.store)
    app.state.broadcaster = broadcaster
    try:
        async with broadcaster.running():
            yield
    finally:
        notifier.close()
        engine.dispose()
