"""A job on its way in, whichever address it came to."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Request, Response

from api.dependencies import live_pairs
from api.errors import rate_limit_headers
from api.idempotency import REPLAYED, idempotency_request
from tpo.broker import JobNotifier
from tpo.core.errors import BrokerUnavailableError
from tpo.core.state import State
from tpo.jobs.requests import Submitted
from tpo.jobs.submission import Submit, resolve_models, to_state
from tpo.jobs.tables import Job
from tpo.settings import Settings
from tpo.store import Store
from tpo.tenants.tenants import Limits

logger = logging.getLogger("api")


class Submitter:
    """Takes submissions of one request."""

    def __init__(
        self, store: Store, notifier: JobNotifier, settings: Settings, request: Request, response: Response
    ) -> None:
        self._store = store
        self._notifier = notifier
        self._settings = settings
        self._request = request
        self._headers = response.headers

    def submit(self, body: Submit) -> Job:
        """Commit a job and notify the workers. Once this returns, the job survives any crash.

        Raises IdempotencyConflictError, ExternalIdTakenError, QuotaExceededError.
        """
        settings = self._settings
        model, reward_model = resolve_models(body, settings, lambda: live_pairs(self._store, settings))
        made = self._store.jobs.submit(
            to_state(body, model, settings),
            idempotency=idempotency_request(self._request, settings, body.model_dump(mode="json", exclude_unset=True)),
            limits=self.limits,
            model=model,
            reward_model=reward_model,
            max_attempts=settings.max_attempts,
            metadata=body.metadata,
            priority=body.priority,
            deadline_seconds=body.deadline_seconds,
            external_id=body.external_id,
        )
        return self.made(made)

    def create_from(self, source: Job, state: State, said: Mapping[str, Any]) -> Job:
        """A new job that starts from what `source` has recorded; `said` is what the request holds."""
        made = self._store.jobs.create_from(
            source.id,
            state,
            idempotency=idempotency_request(self._request, self._settings, said),
            limits=self.limits,
            model=source.model,
            reward_model=source.reward_model,
            max_attempts=self._settings.max_attempts,
            metadata=source.job_metadata,
            priority=source.priority,
        )
        return self.made(made)

    def notify(self, job: Job) -> None:
        """Ring for a job; where that cannot be done now, the sweeper does it."""
        try:
            self._notifier.notify_job(job.id, job.model)
        except BrokerUnavailableError as error:
            request_id = self._request.state.request_id
            logger.warning("request %s: the rescuer will notify the workers of %s: %s", request_id, job.id, error)

    @property
    def limits(self) -> Limits:
        """How much a tenant without limits of its own may ask for."""
        return Limits(self._settings.max_jobs_in_flight, self._settings.max_jobs_per_minute)

    def made(self, made: Submitted) -> Job:
        """Ring for a new job, and tell with the answer's headers what became of the request."""
        if made.new:
            self.notify(made.job)
        else:
            self._headers.update(REPLAYED)
        if made.rate_limit:
            self._headers.update(
                rate_limit_headers(made.rate_limit.limit, made.rate_limit.remaining, made.rate_limit.reset)
            )
        return made.job


async def _submitter(request: Request, response: Response) -> Submitter:
    # Not of other dependencies: each one that FastAPI looks through costs as much as a look into the database's cache.
    held = request.app.state
    return Submitter(held.store.for_tenant(request.state.tenant), held.notifier, held.settings, request, response)


SubmitterDep = Annotated[Submitter, Depends(_submitter)]
