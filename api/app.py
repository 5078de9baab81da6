"""The application: what it holds, its routes, its documentation."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline

import tpo
from api import actions, batches, chat, errors, events, files, jobs, meta, responses, webhooks
from api.answers import ALWAYS
from api.envelope import PROTECTED, Envelope
from api.examples import EXAMPLES
from api.feed import Feed
from api.metrics import Metrics
from tpo.errors import DatabaseRefused, StoreUnavailable
from tpo.jobs import schema
from tpo.jobs.database import connect
from tpo.jobs.store import Store
from tpo.queue import Doorbell
from tpo.settings import Settings
from tpo.settings import settings as environment

logger = logging.getLogger("api")

_DESCRIPTION = """
Test-Time Preference Optimization: the policy improves its own answer under a reward model, step by step, with every
step recorded. Submit a job, poll it until its `status` is terminal, read its `output`.

Every error is `application/problem+json` (RFC 9457) with an `error` {message, type, code, param} beside it. Every
answer has an `x-request-id`.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API over the database and broker of these settings; default: of the environment."""
    settings = settings or environment()
    # Its pages need no other server: /docs works on a machine without a network, and tells nobody who reads it.
    app = FastAPIOffline(
        title="TPO",
        version=tpo.__version__,
        description=_DESCRIPTION,
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.metrics = Metrics()
    app.add_middleware(Envelope, settings=settings)
    errors.install(app)
    ours = (jobs.router, actions.router, events.router, webhooks.router, meta.served, meta.router)
    for router in (*ours, responses.router, chat.router, files.router, batches.router):
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Hold the database and the doorbell while the server runs. Raises DatabaseRefused, SchemaOutOfDate."""
    settings: Settings = app.state.settings
    engine = connect(settings.database_url.get_secret_value())
    doorbell = Doorbell(settings.broker_url.get_secret_value())
    try:
        schema.check(engine)
    except DatabaseRefused:
        raise
    except StoreUnavailable as error:
        logger.warning("requests are answered with 503 until that has passed: %s", error)
    app.state.store = Store(engine)
    app.state.doorbell = doorbell
    feed = Feed(app.state.store)
    app.state.feed = feed
    try:
        async with feed.running():
            yield
    finally:
        doorbell.close()
        engine.dispose()


_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_ALWAYS = {
    str(status): {"description": answer["description"], "content": answer["content"]}
    for status, answer in ALWAYS.items()
}


def _problem(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    """How an address tells of an error: its examples name it."""
    shown = {}
    for code, example in answer["content"]["application/json"]["examples"].items():
        value = example["value"]  # out of which FastAPI leaves the nulls
        shown[code] = {"value": {**value, "instance": path, "error": {"param": None, **value["error"]}}}
    content = {"application/problem+json": {"schema": _PROBLEM, "examples": shown}}
    return {"description": answer["description"], "content": content}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the API, with what FastAPI cannot know: how errors are sent, and the key."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        settings: Settings = app.state.settings
        # A server without any key asks for none, and it may have its first one made while it runs.
        secured: list[dict[str, list[str]]] = [{"key": []}, *([] if settings.api_key or settings.require_key else [{}])]
        for path, operations in described["paths"].items():
            for operation in operations.values():
                if path.startswith(PROTECTED):
                    operation["security"] = secured
                    operation["responses"] = {**_ALWAYS, **operation["responses"]}
                for status, answer in operation["responses"].items():
                    if int(status) >= 400:
                        operation["responses"][status] = _problem(path, answer)
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for name, shown in EXAMPLES.items():
            described["components"]["schemas"][name]["examples"] = [shown]
        app.openapi_schema = described
    return app.openapi_schema
