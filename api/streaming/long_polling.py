"""Waiting for a job without a thread and without a query of one's own: by the process's one reader of events."""

import time

from starlette.concurrency import run_in_threadpool

from api.streaming.broadcaster import EventBroadcaster
from tpo.core.errors import StoreUnavailableError
from tpo.core.status import TERMINAL
from tpo.jobs.view import JobView
from tpo.store import Store

_ENDS = frozenset(f"job.{status}" for status in TERMINAL)


async def until_ended(broadcaster: EventBroadcaster, store: Store, job: JobView, seconds: float) -> JobView:
    """The job when it has ended, or as it stands when the time is up."""
    return await _wait(broadcaster, store, job, seconds, any_event=False)


async def until_changed(broadcaster: EventBroadcaster, store: Store, job: JobView, seconds: float) -> JobView:
    """The job after its next event, or as it stands when the time is up."""
    return await _wait(broadcaster, store, job, seconds, any_event=True)


async def _wait(
    broadcaster: EventBroadcaster, store: Store, job: JobView, seconds: float, *, any_event: bool
) -> JobView:
    if job.status in TERMINAL or broadcaster.full:
        return job
    end = time.monotonic() + seconds
    async with broadcaster.subscribe(job.id, job.last_event) as subscription:
        try:
            if subscription.seen > job.last_event:  # the reader was ahead of what was read of the job
                job = await run_in_threadpool(store.jobs.get, job.id)
                if any_event or job.status in TERMINAL:
                    return job
            while (left := end - time.monotonic()) > 0:
                event = await subscription.next(left)
                if event is None or any_event or event.type in _ENDS:
                    break
        except TimeoutError:
            pass  # not every change has an event
        except StoreUnavailableError:
            return job
    try:
        return await run_in_threadpool(store.jobs.get, job.id)
    except StoreUnavailableError:
        return job
