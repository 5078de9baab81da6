"""Routes of models and prompt sets."""

from collections import defaultdict
from collections.abc import Iterable

from fastapi import APIRouter

from api import schemas
from api.dependencies import (
    NoQuery,
    SettingsDep,
    StoreDep,
    live_workers,
)
from api.openapi.errors import INVALID, MODEL_NOT_FOUND, UNAVAILABLE
from tpo.core import prompts
from tpo.core.errors import ModelNotFoundError
from tpo.jobs.tables import Worker
from tpo.settings import Settings
from tpo.store import Store

router = APIRouter(prefix="/v1", tags=["models"], dependencies=[NoQuery], responses={**INVALID, **UNAVAILABLE})


@router.get("/models")
def list_models(store: StoreDep, settings: SettingsDep) -> schemas.ModelList:
    """List the policies that live workers serve."""
    return schemas.ModelList(data=_models(store, settings))


@router.get("/models/{model_id:path}", responses=MODEL_NOT_FOUND)
def get_model(model_id: str, store: StoreDep, settings: SettingsDep) -> schemas.Model:
    """Get a policy that live workers serve."""
    for each in _models(store, settings):
        if each.id == model_id:
            return each
    raise ModelNotFoundError()


@router.get("/reward-models")
def list_reward_models(store: StoreDep, settings: SettingsDep) -> schemas.RewardModelList:
    """List the reward models that live workers serve."""
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


@router.get("/prompt-sets")
def list_prompt_sets(settings: SettingsDep) -> schemas.PromptSetList:
    """List the prompt sets that a job can use."""
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


def _grouped(workers: Iterable[Worker], by: str) -> dict[str, list[Worker]]:
    groups: dict[str, list[Worker]] = defaultdict(list)
    for worker in workers:
        groups[getattr(worker, by)].append(worker)
    return groups
