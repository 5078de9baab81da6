"""Change existing jobs: cancel, pause, resume, retry, extend, delete. Each is one conditional UPDATE."""

import secrets
from typing import Unpack

from sqlalchemy import delete

from tpo.core.errors import WrongStateError
from tpo.core.state import MAX_ITERATIONS, State
from tpo.core.status import TERMINAL
from tpo.db import now, writing
from tpo.jobs.events import Event
from tpo.jobs.insertion import JobOptions
from tpo.jobs.records import without_progress
from tpo.jobs.requests import JobRequests, Submitted
from tpo.jobs.tables import Job
from tpo.jobs.transitions import CANCELLED, job_in_status, transition, update_job
from tpo.jobs.view import JobView
from tpo.tenants.idempotency import IdempotencyRequest
from tpo.tenants.tenants import Limits

CANNOT_BE_PAUSED = "The job is {}: it cannot be paused."
_CANNOT_BE_RETRIED = "The job is {}: only a waiting job, or one that ended without success, can be retried."


class JobQueries(JobRequests):
    """The part of the store that holds the jobs of one tenant."""

    def cancel(self, job_id: str) -> JobView:
        """Cancel a job: immediately if no worker holds it, else within one model call. Raises JobNotFoundError."""
        with writing(self._engine) as session:
            job = self._own(session, job_id, lock=True)
            request = {"cancel_requested_at": now()}
            if job.status == "in_progress":
                values = request | {"status": "cancelling", "pause_requested_at": None}
                transition(session, job_in_status(job_id, "in_progress"), values, Event("job.cancelling", {}))
            elif job.status in ("queued", "paused"):
                transition(session, job_in_status(job_id, job.status), request | CANCELLED, Event("job.cancelled", {}))
            return JobView.of(job)

    def pause(self, job_id: str) -> JobView:
        """Pause a job: immediately if no worker holds it, else within one model call.

        Raises JobNotFoundError, WrongStateError.
        """
        with writing(self._engine) as session:
            job = self._own(session, job_id, lock=True)
            match job.status:
                case "queued":
                    values = {"status": "paused", "next_attempt_at": None}
                    transition(session, job_in_status(job_id, "queued"), values, Event("job.paused", {}))
                case "in_progress":
                    if job.pause_requested_at is None:
                        session.execute(update_job(job_in_status(job_id, "in_progress"), {"pause_requested_at": now()}))
                        session.refresh(job)
                case "paused":
                    pass
                case status:
                    raise WrongStateError(CANNOT_BE_PAUSED.format(status))
            return JobView.of(job)

    def resume(self, job_id: str) -> JobView:
        """Resume a paused job, or withdraw a requested pause. Raises JobNotFoundError, WrongStateError."""
        with writing(self._engine) as session:
            job = self._own(session, job_id, lock=True)
            match job.status:
                case "paused":
                    values = {"status": "queued", "queued_at": now()}
                    transition(session, job_in_status(job_id, "paused"), values, Event("job.resumed", {}))
                case "in_progress":
                    if job.pause_requested_at is not None:
                        session.execute(update_job(job_in_status(job_id, "in_progress"), {"pause_requested_at": None}))
                        session.refresh(job)
                case "queued":
                    pass
                case status:
                    raise WrongStateError(f"The job is {status}: it cannot be resumed.")
            return JobView.of(job)

    def retry_now(self, job_id: str) -> JobView:
        """End a queued job's wait for its next attempt. Raises JobNotFoundError, WrongStateError."""
        with writing(self._engine) as session:
            job = self._own(session, job_id, lock=True)
            if job.status != "queued":
                raise WrongStateError(_CANNOT_BE_RETRIED.format(job.status))
            session.execute(update_job(job_in_status(job_id, "queued"), {"next_attempt_at": None, "queued_at": now()}))
            session.refresh(job)
            return JobView.of(job)

    def create_from(
        self,
        job_id: str,
        state: State,
        *,
        idempotency: IdempotencyRequest | None,
        limits: Limits | None,
        **options: Unpack[JobOptions],
    ) -> Submitted:
        """Create a job that starts from the record of another job. Its own usage starts at zero."""
        options["source_id"] = job_id
        return self.submit(state.model_copy(update={"calls": ()}), idempotency=idempotency, limits=limits, **options)

    def delete(self, job_id: str) -> None:
        """Delete an ended job with all its texts. Raises JobNotFoundError, WrongStateError."""
        with writing(self._engine) as session:
            job = self._own(session, job_id, lock=True)
            if job.status not in TERMINAL:
                raise WrongStateError(f"The job is {job.status}: cancel it first, and delete it once it has ended.")
            session.execute(delete(Job).where(Job.id == job_id, Job.tenant == self.tenant))


def retried(job: JobView, state: State) -> State:
    """Return the state from which a job that ended without success is retried. Raises WrongStateError."""
    if job.status not in TERMINAL or job.status == "completed":
        raise WrongStateError(_CANNOT_BE_RETRIED.format(job.status))
    if job.error_code != "no_usable_sample":
        return state
    # The same seed would sample the same texts again.
    params = state.params.model_copy(update={"seed": secrets.randbits(53)})
    return without_progress(state).model_copy(update={"params": params})


def extended(job: JobView, state: State, iterations: int, most: int = MAX_ITERATIONS) -> State:
    """Return the state of an ended job with `iterations` more to run. Raises WrongStateError."""
    if job.status not in TERMINAL:
        raise WrongStateError(f"The job is {job.status}: it can be extended once it has ended.")
    if state.best is None:
        raise WrongStateError("The job has no candidate with a reward to start from.")
    if state.params.mode == "bon":
        raise WrongStateError("The job is best-of-N: it has no iterations to add to.")
    total = state.params.max_iterations + iterations
    if total > most:
        raise WrongStateError(f"The job would have {total} iterations; this server allows at most {most}.")
    return state.model_copy(update={"params": state.params.model_copy(update={"max_iterations": total})})
