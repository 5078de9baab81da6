"""Routes of health, readiness and metrics."""

from fastapi import APIRouter, Request
from fastapi import Response as HTTPResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse

import tpo
from api import schemas
from api.dependencies import BroadcasterDep, NotifierDep, ServerStoreDep, SettingsDep, TenantDep
from api.errors import problem
from api.metrics import Metrics
from api.openapi.errors import NOT_READY, NOT_SHOWN, UNAVAILABLE
from api.openapi.examples import METRICS
from tpo.broker import JobNotifier
from tpo.core.errors import BrokerUnavailableError, StoreUnavailableError
from tpo.db import DEFAULT_TENANT
from tpo.settings import Settings
from tpo.store import Store

router = APIRouter(tags=["server"])


@router.get("/")
def get_index(settings: SettingsDep) -> schemas.Welcome:
    """Show where the documentation and the main routes are."""
    root = settings.root_path or ""
    return schemas.Welcome(
        name="tpo",
        version=tpo.__version__,
        docs=f"{root}/docs",
        openapi=f"{root}/openapi.json",
        jobs=f"{root}/v1/jobs",
        ready=f"{root}/readyz",
    )


@router.get("/healthz")
async def get_health() -> schemas.Health:
    """Check that this process is alive."""
    # The one async route: it must answer while every thread waits for a database that hangs.
    return schemas.Health()


@router.get("/readyz", response_model=schemas.Ready, responses=NOT_READY)
def get_readiness(
    request: Request, store: ServerStoreDep, notifier: NotifierDep, settings: SettingsDep
) -> schemas.Ready | JSONResponse:
    """Check that a job would run now: database, broker and at least one worker."""
    database, worker = _database_and_worker(store, settings)
    checks = schemas.Checks(database=database, broker=_broker(notifier), worker=worker)
    missing = [name for name, check in checks if check == "missing"]
    if missing:
        detail = f"Missing: {', '.join(missing)}."
        return problem(request.scope, 503, detail=detail, code="not_ready", checks=checks)
    return schemas.Ready(checks=checks)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={
        200: {"content": {"text/plain": {"example": METRICS}}, "description": "Prometheus' text format"},
        **NOT_SHOWN,
        **UNAVAILABLE,
    },
)
def get_metrics(
    request: Request, tenant: TenantDep, store: ServerStoreDep, broadcaster: BroadcasterDep, settings: SettingsDep
) -> HTTPResponse:
    """Get the requests of this process and the queue of each policy, for Prometheus.

    They count every tenant's, so a server with keys shows them to the tenant `default` alone.
    """
    if tenant != DEFAULT_TENANT:
        raise HTTPException(404)
    try:
        queues = store.queues.page(settings.worker_timeout_seconds)
    except StoreUnavailableError:
        queues = None
    metrics: Metrics = request.app.state.metrics
    return HTTPResponse(metrics.render(queues, broadcaster.subscriptions), media_type=CONTENT_TYPE_LATEST)


def _database_and_worker(store: Store, settings: Settings) -> tuple[schemas.Check, schemas.Check]:
    try:
        # Stricter than `worker_timeout_seconds`: a worker that is silent for one lease has lost its jobs.
        return "ok", "ok" if store.workers.live(settings.lease_seconds) else "missing"
    except StoreUnavailableError:
        return "missing", "unknown"


def _broker(notifier: JobNotifier) -> schemas.Check:
    try:
        notifier.ping()
    except BrokerUnavailableError:
        return "missing"
    return "ok"
