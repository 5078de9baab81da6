"""The event stream of a job, resumed where it stopped if the connection is lost."""

from collections.abc import Iterator

from httpx_sse import EventSource

from tpo.client.errors import APIConnectionError, ClientError, NotFoundError
from tpo.client.transport import Transport
from tpo.client.types import TERMINAL, Event

SILENCE_SECONDS = 45.0
"""The server sends something every 15 s. After this silence the connection counts as dead."""

_LAST_EVENTS = frozenset(f"job.{status}" for status in TERMINAL)


def follow(transport: Transport, job_path: str, after: int) -> Iterator[Event]:
    """Iterate over the events after a number until the job's last one, in order, without duplicates.

    Raises ClientError.
    """
    attempt = 0
    while True:
        seen = after
        try:
            for event in _open_stream(transport, job_path, after):
                after = event["sequence_number"]
                attempt = 0
                yield event
                if event["type"] in _LAST_EVENTS:
                    return
            # The stream closed normally without events: the job had ended at that number or before.
            if after == seen and transport.json("GET", job_path)["status"] in TERMINAL:
                return
            error: ClientError = APIConnectionError(f"the server at {transport.url} ends its event streams early")
        except ClientError as caught:
            error = caught
        transport.backoff.wait(attempt, error)
        attempt += 1


def _open_stream(transport: Transport, job_path: str, after: int) -> Iterator[Event]:
    """Iterate over the events of one connection."""
    headers = {"accept": "text/event-stream", "last-event-id": str(after)}
    response = transport.open(f"{job_path}/events", headers, SILENCE_SECONDS)
    try:
        received = EventSource(response).iter_sse()
        while (sse := transport.translate_errors(lambda: next(received, None))) is not None:
            if not sse.data:
                continue  # a comment that keeps the connection alive
            event = transport.parse_json(sse.data)
            if event["type"] == "stream.closed":
                if event["reason"] == "job_deleted":
                    raise NotFoundError("the job was deleted", 404, {"code": "job_not_found"}, response.headers)
                return
            yield event
    finally:
        response.close()
