"""Wait for a job by its events, without a thread or polling query per request."""

import time

from starlette.concurrency import run_in_threadpool

from api.streaming.broadcaster import EventBroadcaster
from tpo.core.errors import StoreUnavailableError
from tpo.core.status import TERMINAL
from tpo.jobs.view import JobView
from tpo.store import Store

_ENDS = frozenset(f"job.{status}" for status in TERMINAL)


async def until_ended(broadcaster: EventBroadcaster, store: Store, job: JobView, seconds: float) -> JobView:
    """Wait up to `seconds` for the job to end, and return its latest view."""
    return await _wait(broadcaster, store, job, seconds, any_event=False)


async def until_changed(broadcaster: EventBroadcaster, store: Store, job: JobView, seconds: float) -> JobView:
    """Wait up to `seconds` for the job's next event, and return its latest view."""
    return await _wait(broadcaster, store, job, seconds, any_event=True)


async def _wait(
    broadcaster: EventBroadcaster, store: Store, job: JobView, seconds: float, *, any_event: bool
) -> JobView:
    if job.status in TERMINAL or broadcaster.full:
        return job
    end = time.monotonic() + seconds
    async with broadcaster.subscribe(job.id, job.last_event) as subscription:
        try:
            if subscription.seen > job.last_event:  # the broadcaster has seen more events than this row
                job = await run_in_threadpool(store.jobs.get, job.id)
                if any_event or job.status in TERMINAL:
                    return job
            while (left := end - time.monotonic()) > 0:
                event = await subscription.next(left)
                if event is None or any_event or event.type in _ENDS:
                    break
        except TimeoutError:
            pass  # the row is read again below: not every change has an event
        except StoreUnavailableError:
            return job
    try:
        return await run_in_threadpool(store.jobs.get, job.id)
    except StoreUnavailableError:
        return job
