"""Dependencies of routes, as annotated types."""

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from api.schemas.jobs import JOB_ID
from api.streaming.broadcaster import EventBroadcaster
from tpo.broker import JobNotifier
from tpo.core.errors import InvalidInputError, JobNotFoundError, NotFoundError
from tpo.jobs.submission import Served
from tpo.jobs.tables import Worker
from tpo.settings import Settings
from tpo.store import Store

# These are coroutines because FastAPI runs plain functions in a thread, which is slower.


async def _tenant(request: Request) -> str:
    tenant: str = request.state.tenant
    return tenant


async def _server_store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store.for_tenant(request.state.tenant)


async def _broadcaster(request: Request) -> EventBroadcaster:
    broadcaster: EventBroadcaster = request.app.state.broadcaster
    return broadcaster


async def _notifier(request: Request) -> JobNotifier:
    notifier: JobNotifier = request.app.state.notifier
    return notifier


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _job_id(job_id: str) -> str:
    # An invalid id never reaches the database: PostgreSQL raises an error for some characters.
    if not re.fullmatch(JOB_ID, job_id):
        raise JobNotFoundError()
    return job_id


def printable_id(given: str, missing: NotFoundError) -> str:
    """Return the id of a path if the database can look it up. Raises `missing` otherwise."""
    if not given.isascii() or not given.isprintable():
        raise missing
    return given


async def _refuse_query(request: Request) -> None:
    for name in request.query_params:
        raise InvalidInputError(f"{name}: is not a known parameter; this path has none.", name)


TenantDep = Annotated[str, Depends(_tenant)]
"""The tenant whose key authenticates the request."""

StoreDep = Annotated[Store, Depends(_store)]
"""The store of the tenant: its queries return only the tenant's own rows."""

ServerStoreDep = Annotated[Store, Depends(_server_store)]
"""The store of all tenants, for routes that require no key."""

BroadcasterDep = Annotated[EventBroadcaster, Depends(_broadcaster)]
NotifierDep = Annotated[JobNotifier, Depends(_notifier)]
SettingsDep = Annotated[Settings, Depends(_settings)]
JobId = Annotated[str, Depends(_job_id)]

NoQuery = Depends(_refuse_query)
"""For routes without query parameters: refuses any parameter, since it would have no effect."""


def live_workers(store: Store, settings: Settings) -> Sequence[Worker]:
    """Return the workers with a recent heartbeat. Raises StoreUnavailableError."""
    return store.workers.live(settings.worker_timeout_seconds)


def live_pairs(store: Store, settings: Settings) -> list[Served]:
    """Return the pairs of policy and reward model that live workers serve. Raises StoreUnavailableError."""
    return [Served(w.model, w.reward_model) for w in live_workers(store, settings)]
