"""Routes of jobs: create, list, get, wait."""

import hashlib
import re
from typing import Annotated, cast

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api import schemas, views
from api.bodies import SubmitBody
from api.dependencies import BroadcasterDep, JobId, NoQuery, SettingsDep, StoreDep
from api.openapi.errors import INVALID, INVALID_JOB, NOT_FOUND, TAKEN, TOO_MANY, UNAVAILABLE, UNREADABLE
from api.openapi.parameters import IDEMPOTENCY_KEY, IF_NONE_MATCH, METADATA, PREFER, described
from api.schemas import queries
from api.schemas.paging import PAGE_BYTES
from api.streaming.long_polling import until_changed, until_ended
from api.submission import SubmitterDep
from tpo.core.errors import InvalidInputError
from tpo.core.status import TERMINAL
from tpo.jobs.requests import TextField, Texts
from tpo.jobs.submission import MAX_METADATA

_METADATA = re.compile(r"metadata\[(.{1,64})\]", re.DOTALL)
_PREFERRED_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*(\d{1,9})\s*(?:$|[,;])")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses={**INVALID, **UNAVAILABLE})


@router.post(
    "",
    status_code=202,
    dependencies=[NoQuery],
    responses={
        200: {"model": schemas.Job, "description": "The job ended within the time of `Prefer: wait=N`"},
        **INVALID_JOB,
        **UNREADABLE,
        **TAKEN,
        **TOO_MANY,
    },
    openapi_extra=described(IDEMPOTENCY_KEY, PREFER),
)
async def create_job(
    request: Request,
    body: SubmitBody,
    submitter: SubmitterDep,
    store: StoreDep,
    broadcaster: BroadcasterDep,
    settings: SettingsDep,
    response: Response,
) -> schemas.Job:
    """Create a job. After the response, the job survives any crash.

    A duplicate request (same `Idempotency-Key` or `external_id`) returns the first job. With `Prefer: wait=N` (up to
    60 s), the response is 200 with the ended job if it ends in time.
    """
    row = await run_in_threadpool(submitter.submit, body)
    if preferred := _PREFERRED_WAIT.search(request.headers.get("prefer", "")):
        seconds = min(int(preferred.group(1)), queries.MAX_WAIT_SECONDS)
        response.headers["preference-applied"] = f"wait={seconds}"
        row = await until_ended(broadcaster, store, row, seconds)
        if row.status in TERMINAL:
            response.status_code = 200
    response.headers["location"] = f"/v1/jobs/{row.id}"
    return views.job(row, settings)


@router.get("", openapi_extra=described(METADATA))
def list_jobs(query: Annotated[queries.JobQuery, Query()], store: StoreDep, settings: SettingsDep) -> schemas.JobPage:
    """List jobs by creation time. Repeat `metadata[KEY]=VALUE` to filter by several pairs.

    A page ends at its limit, or at 1 MiB. Texts are left out unless `include` asks for them.
    """
    metadata = _metadata(query.model_extra or {})
    rows = store.jobs.page(
        limit=query.limit + 1,
        after=query.after,
        order=query.order,
        statuses=query.status,
        metadata=metadata,
        texts=False,
    )
    limit, texts = query.limit, list[Texts]()
    if query.include and rows:
        fields = cast("list[TextField]", query.include.split(","))
        texts = store.jobs.texts([row.id for row in rows[:limit]], fields, PAGE_BYTES)
        limit = len(texts)
    texts += [Texts(None, None)] * (len(rows) - len(texts))
    pairs = [*zip(rows, texts, strict=True)]
    return schemas.JobPage.of(pairs, limit, lambda pair: views.job_summary(pair[0], settings, pair[1]))


@router.get(
    "/{job_id}",
    response_model=schemas.Job,
    responses={304: {"description": "The job still has the `ETag` in `If-None-Match`"}, **NOT_FOUND},
    openapi_extra=described(IF_NONE_MATCH),
)
async def get_job(
    request: Request,
    job_id: JobId,
    store: StoreDep,
    broadcaster: BroadcasterDep,
    settings: SettingsDep,
    query: Annotated[queries.WaitQuery, Query()],
) -> Response:
    """Get a job, with an `ETag`. With `wait`, the response is sent when the job has ended or the time has passed.

    With `wait` and `If-None-Match`, the response is sent as soon as the job has changed.
    """
    row = await run_in_threadpool(store.jobs.get, job_id)
    known = _known(request)
    body, tag = _shown(views.job(row, settings))
    if query.wait and (not known or tag in known):
        wait = until_changed if known else until_ended
        row = await wait(broadcaster, store, row, query.wait)
        body, tag = _shown(views.job(row, settings))
    headers = {"etag": tag, "cache-control": "private, no-cache"}
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.get("/{job_id}/iterations", responses=NOT_FOUND)
def list_iterations(
    job_id: JobId, store: StoreDep, query: Annotated[queries.IterationQuery, Query()]
) -> schemas.IterationList:
    """List the iterations of a job: the compared candidates, critique, gradient and result of each."""
    return views.iterations(store.jobs.get(job_id), store.jobs.state(job_id), query.after)


@router.get("/{job_id}/candidates", responses=NOT_FOUND)
def list_candidates(
    job_id: JobId, store: StoreDep, query: Annotated[queries.CandidateQuery, Query()]
) -> schemas.CandidateList:
    """List the candidates of a job with their rewards."""
    return views.candidates(store.jobs.state(job_id), query.after)


def _shown(job: schemas.Job) -> tuple[bytes, str]:
    body = job.model_dump_json().encode()
    return body, f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'


def _known(request: Request) -> set[str]:
    tags = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
    return {tag for tag in tags if tag}


def _metadata(given: dict[str, object]) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for name, value in given.items():
        if len(wanted) == MAX_METADATA:
            raise InvalidInputError(f"{name}: a job has at most {MAX_METADATA} pairs", name)
        found = _METADATA.fullmatch(name)
        if found is None:
            raise InvalidInputError(f"{name}: is not a known field", name)
        if not isinstance(value, str) or "\x00" in name + value:
            raise InvalidInputError(f"{name}: must appear only once and contain no NUL character", name)
        wanted[found.group(1)] = value
    return wanted
