"""Create jobs for the routes of jobs, responses and chat completions."""

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
from tpo.jobs.view import JobView
from tpo.settings import Settings
from tpo.store import Store
from tpo.tenants.tenants import Limits

logger = logging.getLogger("api")


class Submitter:
    """Creates the job of one request."""

    def __init__(
        self, store: Store, notifier: JobNotifier, settings: Settings, request: Request, response: Response
    ) -> None:
        self._store = store
        self._notifier = notifier
        self._settings = settings
        self._request = request
        self._headers = response.headers

    def submit(self, body: Submit) -> JobView:
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
        return self._accepted(made)

    def create_from(self, source: JobView, state: State, body: Mapping[str, Any]) -> JobView:
        """Create a job that starts from the record of `source`. `body` is the body of the request."""
        made = self._store.jobs.create_from(
            source.id,
            state,
            idempotency=idempotency_request(self._request, self._settings, body),
            limits=self.limits,
            model=source.model,
            reward_model=source.reward_model,
            max_attempts=self._settings.max_attempts,
            metadata=source.metadata,
            priority=source.priority,
        )
        return self._accepted(made)

    def notify(self, job: JobView) -> None:
        """Notify a worker of a job. If the broker cannot be reached, the rescuer does it later."""
        try:
            self._notifier.notify_job(job.id, job.model)
        except BrokerUnavailableError as error:
            request_id = self._request.state.request_id
            logger.warning("request %s: the rescuer will notify the workers of %s: %s", request_id, job.id, error)

    @property
    def limits(self) -> Limits:
        """Default limits, for tenants without limits of their own."""
        return Limits(
            self._settings.max_jobs_in_flight,
            self._settings.max_jobs_per_minute,
            stored_bytes=self._settings.max_stored_bytes,
        )

    def _accepted(self, made: Submitted) -> JobView:
        """Notify a worker of a new job, and set the response's headers for quota and duplicates."""
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
    # Uses no other dependencies: each one that FastAPI resolves costs about as much as a cached query.
    shared = request.app.state
    return Submitter(shared.store.for_tenant(request.state.tenant), shared.notifier, shared.settings, request, response)


SubmitterDep = Annotated[Submitter, Depends(_submitter)]
