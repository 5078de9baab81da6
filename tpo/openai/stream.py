"""Translation of a job's events into the events of a response, with OpenAI's names.

The number of response events that a job event gives depends only on its type and on the job's answer. So sequence
numbers are the same whenever the stream is read, and `starting_after` resumes a stream where it stopped.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from tpo.core.status import TERMINAL
from tpo.jobs.tables import EventRow
from tpo.jobs.view import JobView
from tpo.openai import views

_LAST_EVENTS = {"completed": "response.completed", "failed": "response.failed"}
_WAITING_EVENTS = ("job.queued", "job.retrying", "job.paused", "job.resumed")


class ResponseEvents:
    """Translates the events of one job, from the first one on and in order, into events of its response."""

    def __init__(self) -> None:
        self._next = 0

    def of(self, job: JobView, events: Iterable[EventRow]) -> Iterator[dict[str, Any]]:
        """Translate further events. `job` must be at least as new as the last one."""
        for event in events:
            for translated in _translate(job, event):
                yield {**translated, "sequence_number": self._next}
                self._next += 1


def _translate(job: JobView, event: EventRow) -> Iterator[dict[str, Any]]:
    status = event.type.removeprefix("job.")
    if status in TERMINAL:
        yield from _end(job)
        return
    waiting = event.type in _WAITING_EVENTS
    snapshot = _snapshot(job, event, "queued" if waiting else "in_progress")
    if event.number == 1:
        yield {"type": "response.created", "response": snapshot}
    yield {"type": "response.queued" if waiting else "response.in_progress", "response": snapshot}


def _snapshot(job: JobView, event: EventRow, status: views.ResponseStatus) -> dict[str, Any]:
    """Return the response as it was at an event, without the results that the job has had since then."""
    response = views.response(job)
    details = response.tpo.model_copy(
        update={"event": {"type": event.type, **event.data}, "error_code": None, "stop_reason": None}
    )
    changes: dict[str, Any] = {
        "status": status,
        "completed_at": None,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "tpo": details,
    }
    return response.model_copy(update=changes).model_dump()


def _end(job: JobView) -> Iterator[dict[str, Any]]:
    """Iterate over the events of a job's end: its output, then the whole response."""
    response = views.response(job)
    for index, item in enumerate(response.output):
        position: dict[str, Any] = {"item_id": item.id, "output_index": index, "content_index": 0}
        part = item.content[0]
        empty = item.model_copy(update={"status": "in_progress", "content": []})
        yield {"type": "response.output_item.added", "output_index": index, "item": empty.model_dump()}
        yield {
            "type": "response.content_part.added",
            **position,
            "part": part.model_copy(update={"text": ""}).model_dump(),
        }
        yield {"type": "response.output_text.delta", **position, "delta": part.text, "logprobs": []}
        yield {"type": "response.output_text.done", **position, "text": part.text, "logprobs": []}
        yield {"type": "response.content_part.done", **position, "part": part.model_dump()}
        yield {"type": "response.output_item.done", "output_index": index, "item": item.model_dump()}
    yield {"type": _LAST_EVENTS.get(job.status, "response.incomplete"), "response": response.model_dump()}
