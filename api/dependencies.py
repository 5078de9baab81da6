"""Dependencies named as types, so that a route reads as its signature."""

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

# These are coroutines so that FastAPI calls them at once: a plain function costs a trip to a thread.


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
    # What cannot be an id is not asked of the database, which would choke on some of it.
    if not re.fullmatch(JOB_ID, job_id):
        raise JobNotFoundError("There is no job with this id.")
    return job_id


def printable_id(given: str, missing: NotFoundError) -> str:
    """An id from an address that a database can be asked for. Raises `missing` of all others."""
    if not given.isascii() or not given.isprintable():
        raise missing
    return given


async def _refuse_query(request: Request) -> None:
    for name in request.query_params:
        raise InvalidInputError(f"{name}: is not a known parameter; this address takes none.", name)


TenantDep = Annotated[str, Depends(_tenant)]
"""Who asks: whose key came with the request."""

StoreDep = Annotated[Store, Depends(_store)]
"""The store as the tenant sees it: no query of it gives another's job."""

ServerStoreDep = Annotated[Store, Depends(_server_store)]
"""The store for routes that need no key."""

BroadcasterDep = Annotated[EventBroadcaster, Depends(_broadcaster)]
NotifierDep = Annotated[JobNotifier, Depends(_notifier)]
SettingsDep = Annotated[Settings, Depends(_settings)]
JobId = Annotated[str, Depends(_job_id)]

NoQuery = Depends(_refuse_query)
"""For routes without query parameters: one that has no effect is refused."""


def live_workers(store: Store, settings: Settings) -> Sequence[Worker]:
    """The workers that live: one that was silent for two leases does not. Raises StoreUnavailableError."""
    return store.workers.live(settings.worker_timeout_seconds)


def live_pairs(store: Store, settings: Settings) -> list[Served]:
    """The policies and reward models that can be asked for together now. Raises StoreUnavailableError."""
    return [Served(w.model, w.reward_model) for w in live_workers(store, settings)]
