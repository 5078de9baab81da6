"""A job's events as the events of a response, under OpenAI's names.

One event of a job gives a fixed number of them, by its type and what the job answered alone, so that numbers are the
same whenever the stream is read, and `starting_after` resumes where it was cut.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from tpo.core.status import TERMINAL
from tpo.jobs.tables import EventRow, Job
from tpo.openai import views

_ENDS = {"completed": "response.completed", "failed": "response.failed"}
_WAITS = ("job.queued", "job.retrying", "job.paused", "job.resumed")


class ResponseEvents:
    """Turns the events of one job, given in their order from the first, into those of its response."""

    def __init__(self) -> None:
        self._next = 0

    def of(self, job: Job, events: Iterable[EventRow]) -> Iterator[dict[str, Any]]:
        """The events of a response; `job` is as new as the last event."""
        for event in events:
            for told in _told(job, event):
                yield {**told, "sequence_number": self._next}
                self._next += 1


def _told(job: Job, event: EventRow) -> Iterator[dict[str, Any]]:
    status = event.type.removeprefix("job.")
    if status in TERMINAL:
        yield from _end(job)
        return
    waits = event.type in _WAITS
    snapshot = _snapshot(job, event, "queued" if waits else "in_progress")
    if event.number == 1:
        yield {"type": "response.created", "response": snapshot}
    yield {"type": "response.queued" if waits else "response.in_progress", "response": snapshot}


def _snapshot(job: Job, event: EventRow, status: views.ResponseStatus) -> dict[str, Any]:
    """The response as it was then: what came of it later is not told before its time."""
    shown = views.response(job)
    details = shown.tpo.model_copy(
        update={"event": {"type": event.type, **event.data}, "error_code": None, "stop_reason": None}
    )
    then: dict[str, Any] = {
        "status": status,
        "completed_at": None,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "tpo": details,
    }
    return shown.model_copy(update=then).model_dump()


def _end(job: Job) -> Iterator[dict[str, Any]]:
    shown = views.response(job)
    for position, item in enumerate(shown.output):
        at: dict[str, Any] = {"item_id": item.id, "output_index": position, "content_index": 0}
        part = item.content[0]
        empty = item.model_copy(update={"status": "in_progress", "content": []})
        yield {"type": "response.output_item.added", "output_index": position, "item": empty.model_dump()}
        yield {
            "type": "response.content_part.added",
            **at,
            "part": part.model_copy(update={"text": ""}).model_dump(),
        }
        yield {"type": "response.output_text.delta", **at, "delta": part.text, "logprobs": []}
        yield {"type": "response.output_text.done", **at, "text": part.text, "logprobs": []}
        yield {"type": "response.content_part.done", **at, "part": part.model_dump()}
        yield {"type": "response.output_item.done", "output_index": position, "item": item.model_dump()}
    yield {"type": _ENDS.get(job.status, "response.incomplete"), "response": shown.model_dump()}
