"""What the server is, whether it is well, and what its workers serve."""

from collections import defaultdict
from collections.abc import Iterable

from fastapi import APIRouter, Request
from fastapi import Response as HTTPResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse

import tpo
from api import schemas
from api.answers import INVALID, MODEL_NOT_FOUND, NOT_READY, NOT_SHOWN, UNAVAILABLE
from api.deps import DoorbellDep, FeedDep, NoQuery, ServerStoreDep, SettingsDep, StoreDep, TenantDep, live_workers
from api.errors import problem
from api.examples import METRICS
from api.metrics import Metrics
from tpo import prompts
from tpo.errors import ModelNotFound, QueueUnavailable, StoreUnavailable
from tpo.jobs.store import DEFAULT_TENANT, Store
from tpo.jobs.tables import Worker
from tpo.queue import Doorbell
from tpo.settings import Settings

router = APIRouter(tags=["server"])
served = APIRouter(prefix="/v1", tags=["models"], dependencies=[NoQuery], responses={**INVALID, **UNAVAILABLE})


@router.get("/")
def welcome() -> schemas.Welcome:
    """Where to go from here."""
    return schemas.Welcome(
        name="tpo", version=tpo.__version__, docs="/docs", openapi="/openapi.json", jobs="/v1/jobs", ready="/readyz"
    )


@router.get("/healthz")
async def healthz() -> schemas.Health:
    """Whether this process lives."""
    # The one async route: it must answer while every thread waits for a database that hangs.
    return schemas.Health()


@router.get("/readyz", response_model=schemas.Ready, responses=NOT_READY)
def readyz(
    request: Request, store: ServerStoreDep, doorbell: DoorbellDep, settings: SettingsDep
) -> schemas.Ready | JSONResponse:
    """Whether a job would run now: database, broker and at least one worker."""
    database, worker = _database_and_worker(store, settings)
    checks = schemas.Checks(database=database, broker=_broker(doorbell), worker=worker)
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
def metrics(
    request: Request, tenant: TenantDep, store: ServerStoreDep, feed: FeedDep, settings: SettingsDep
) -> HTTPResponse:
    """The requests of this process and the queue of each policy, for Prometheus.

    They count every tenant's, so a server with keys shows them to the tenant `default` alone.
    """
    if tenant != DEFAULT_TENANT:
        raise HTTPException(404)
    try:
        queues = store.queues(2 * settings.lease_seconds)
    except StoreUnavailable:
        queues = None
    counted: Metrics = request.app.state.metrics
    return HTTPResponse(counted.page(queues, feed.listeners), media_type=CONTENT_TYPE_LATEST)


@served.get("/models")
def models(store: StoreDep, settings: SettingsDep) -> schemas.ModelList:
    """The policies that live workers serve."""
    return schemas.ModelList(data=_models(store, settings))


@served.get("/models/{model_id:path}", responses=MODEL_NOT_FOUND)
def model(model_id: str, store: StoreDep, settings: SettingsDep) -> schemas.Model:
    """One policy that live workers serve."""
    for each in _models(store, settings):
        if each.id == model_id:
            return each
    raise ModelNotFound("No live worker serves this policy; /v1/models lists those that are served.")


@served.get("/reward-models")
def reward_models(store: StoreDep, settings: SettingsDep) -> schemas.RewardModelList:
    """The reward models that live workers serve."""
    groups = _grouped(live_workers(store, settings), "reward_model")
    return schemas.RewardModelList(
        data=[
            schemas.RewardModel(
                id=name,
                created=int(min(w.started_at for w in workers)),
                models=sorted({w.model for w in workers}),
                workers=len(workers),
            )
            for name, workers in sorted(groups.items())
        ]
    )


@served.get("/prompt-sets")
def prompt_sets(settings: SettingsDep) -> schemas.PromptSetList:
    """The prompt sets that a job can name."""
    return schemas.PromptSetList(
        data=[
            schemas.PromptSet(
                id=name, version=known.version, style=known.style, default=name == settings.default_prompt_set
            )
            for name in prompts.names()
            for known in [prompts.load(name)]
        ]
    )


def _models(store: Store, settings: Settings) -> list[schemas.Model]:
    return [
        schemas.Model(
            id=name,
            created=int(min(w.started_at for w in workers)),
            reward_models=sorted({w.reward_model for w in workers}),
            workers=len(workers),
        )
        for name, workers in sorted(_grouped(live_workers(store, settings), "model").items())
    ]


def _database_and_worker(store: Store, settings: Settings) -> tuple[schemas.Check, schemas.Check]:
    try:
        # One that is silent for a lease has lost its jobs, whatever else it may be.
        return "ok", "ok" if store.workers(settings.lease_seconds) else "missing"
    except StoreUnavailable:
        return "missing", "unknown"


def _broker(doorbell: Doorbell) -> schemas.Check:
    try:
        doorbell.ping()
    except QueueUnavailable:
        return "missing"
    return "ok"


def _grouped(workers: Iterable[Worker], by: str) -> dict[str, list[Worker]]:
    groups: dict[str, list[Worker]] = defaultdict(list)
    for worker in workers:
        groups[getattr(worker, by)].append(worker)
    return groups
