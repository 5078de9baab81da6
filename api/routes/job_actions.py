"""Routes that change a job: cancel, pause, resume, retry, extend, delete."""

from fastapi import APIRouter, Response

from api import schemas, views
from api.bodies import ExtendBody
from api.dependencies import JobId, NoQuery, SettingsDep, StoreDep
from api.openapi.errors import CONFLICT, INVALID, INVALID_OR_REUSED, NOT_FOUND, TOO_MANY, UNAVAILABLE, UNREADABLE
from api.openapi.parameters import IDEMPOTENCY_KEY, described
from api.submission import SubmitterDep
from tpo.jobs.lifecycle import extended, retried
from tpo.jobs.view import JobView

router = APIRouter(
    prefix="/v1/jobs", tags=["jobs"], dependencies=[NoQuery], responses={**NOT_FOUND, **INVALID, **UNAVAILABLE}
)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: JobId, store: StoreDep, settings: SettingsDep) -> schemas.Job:
    """Cancel a job. Returns the job, even if it had already ended."""
    return views.job(store.jobs.cancel(job_id), settings)


@router.post("/{job_id}/pause", responses=CONFLICT)
def pause_job(job_id: JobId, store: StoreDep, settings: SettingsDep) -> schemas.Job:
    """Pause a job: at once if it waits, after its current model call if it runs (`pause_requested_at`)."""
    return views.job(store.jobs.pause(job_id), settings)


@router.post("/{job_id}/resume", responses=CONFLICT)
def resume_job(job_id: JobId, store: StoreDep, submitter: SubmitterDep, settings: SettingsDep) -> schemas.Job:
    """Resume a paused job from its last checkpoint."""
    job = store.jobs.resume(job_id)
    if job.status == "queued":
        submitter.notify(job)
    return views.job(job, settings)


@router.post(
    "/{job_id}/retry",
    responses={
        202: {"model": schemas.Job, "description": "A new job continues from the record of the old one"},
        **INVALID_OR_REUSED,
        **CONFLICT,
        **TOO_MANY,
    },
    openapi_extra=described(IDEMPOTENCY_KEY),
)
def retry_job(
    job_id: JobId, store: StoreDep, submitter: SubmitterDep, settings: SettingsDep, response: Response
) -> schemas.Job:
    """Retry a job. A job that waits for its next attempt is queued at once.

    A job that ended without success is not changed: a NEW job continues from its record (202, `Location`, `source_id`).
    """
    job = store.jobs.get(job_id)
    if job.status == "queued":
        job = store.jobs.retry_now(job_id)
        submitter.notify(job)
        return views.job(job, settings)
    new = submitter.create_from(job, retried(job, store.jobs.state(job_id)), {})
    return _accepted(new, response, settings)


@router.post(
    "/{job_id}/extend",
    status_code=202,
    responses={**INVALID_OR_REUSED, **UNREADABLE, **CONFLICT, **TOO_MANY},
    openapi_extra=described(IDEMPOTENCY_KEY),
)
def extend_job(
    job_id: JobId,
    body: ExtendBody,
    store: StoreDep,
    submitter: SubmitterDep,
    settings: SettingsDep,
    response: Response,
) -> schemas.Job:
    """Extend an ended job by more iterations. Creates a NEW job that starts from its pool and has its own usage."""
    job = store.jobs.get(job_id)
    state = extended(job, store.jobs.state(job_id), body.iterations, settings.max_iterations)
    return _accepted(submitter.create_from(job, state, body.model_dump()), response, settings)


@router.delete("/{job_id}", responses=CONFLICT)
def delete_job(job_id: JobId, store: StoreDep) -> schemas.Deleted:
    """Delete an ended job and all its texts."""
    store.jobs.delete(job_id)
    return schemas.Deleted(id=job_id)


def _accepted(job: JobView, response: Response, settings: SettingsDep) -> schemas.Job:
    response.status_code = 202
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return views.job(job, settings)
