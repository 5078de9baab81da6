"""Routes of health, readiness and metrics."""

import math
import threading
import time

from fastapi import APIRouter, Request
from fastapi import Response as HTTPResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import Engine
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
from tpo.db import DEFAULT_TENANT, is_disk_full
from tpo.jobs.scheduling import Rules
from tpo.settings import Settings
from tpo.store import Store

_PATIENCE_ROUNDS = 4
"""A job that waits for this many rounds of notifications next to a free slot is stuck."""

_DISK_CHECK_SECONDS = 10.0

router = APIRouter(tags=["server"])


@router.get("/")
def get_index(settings: SettingsDep) -> schemas.Welcome:
    """Get links to the documentation and the main routes."""
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
    # A coroutine, so that it responds while every thread is blocked on the database.
    return schemas.Health()


@router.get("/readyz", response_model=schemas.Ready, responses=NOT_READY)
def get_readiness(
    request: Request, store: ServerStoreDep, notifier: NotifierDep, settings: SettingsDep
) -> schemas.Ready | JSONResponse:
    """Check that jobs can run now: database, broker, at least one worker, a queue that moves and a disk with space."""
    disk_probe: DiskProbe = request.app.state.disk_probe
    database, worker = _database_and_worker(store, settings)
    queue: schemas.QueueCheck = "unknown"
    disk: schemas.DiskCheck = "unknown"
    if database == "ok":
        queue, disk = _queue(store, settings), disk_probe.check()
    checks = schemas.Checks(database=database, broker=_broker(notifier), worker=worker, queue=queue, disk=disk)
    missing = [name for name, check in checks if check == "missing"]
    problems = [f"Missing: {', '.join(missing)}."] if missing else []
    if checks.queue == "stalled":
        problems.append("Jobs wait although workers have free slots.")
    if checks.disk == "full":
        problems.append("The disk that holds the database is full.")
    if problems:
        detail = " ".join(problems)
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
    """Get the metrics of this process and of each policy's queue, for Prometheus.

    They cover all tenants, so a server with keys shows them only to the tenant `default`.
    """
    if tenant != DEFAULT_TENANT:
        raise HTTPException(404)
    try:
        queues = store.queues.page(settings.worker_timeout_seconds)
        rescue_delay = store.maintenance.rescue_delay()
    except StoreUnavailableError:
        queues, rescue_delay = None, 0.0
    metrics: Metrics = request.app.state.metrics
    return HTTPResponse(metrics.render(queues, broadcaster.subscriptions, rescue_delay), media_type=CONTENT_TYPE_LATEST)


def _database_and_worker(store: Store, settings: Settings) -> tuple[schemas.Check, schemas.Check]:
    try:
        # Stricter than `worker_timeout_seconds`: a worker without a heartbeat for one lease has lost its jobs.
        return "ok", "ok" if store.workers.live(settings.lease_seconds) else "missing"
    except StoreUnavailableError:
        return "missing", "unknown"


def _queue(store: Store, settings: Settings) -> schemas.QueueCheck:
    try:
        patience = _PATIENCE_ROUNDS * settings.renotify_seconds
        return (
            "stalled" if store.queues.stalled(patience, settings.lease_seconds, Rules.from_settings(settings)) else "ok"
        )
    except StoreUnavailableError:
        return "unknown"


class DiskProbe:
    """Checks the disk of the database, at most once in some seconds, because the check may write."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._checked_at = -math.inf
        self._result: schemas.DiskCheck = "unknown"

    def check(self) -> schemas.DiskCheck:
        """Return the state of the disk, which is at most _DISK_CHECK_SECONDS old."""
        with self._lock:
            if time.monotonic() - self._checked_at >= _DISK_CHECK_SECONDS:
                try:
                    self._result = "full" if is_disk_full(self._engine) else "ok"
                except StoreUnavailableError:
                    self._result = "unknown"  # such as a user who may create no temporary table
                self._checked_at = time.monotonic()
            return self._result


def _broker(notifier: JobNotifier) -> schemas.Check:
    try:
        notifier.ping()
    except BrokerUnavailableError:
        return "missing"
    return "ok"
