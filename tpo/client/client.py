"""One server, as Python sees it."""

import builtins
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import quote

import httpx

from tpo.client.batch import Result, Row, flow
from tpo.client.errors import ClientError, JobFailedError, WaitTimeoutError
from tpo.client.stream import follow
from tpo.client.transport import Transport
from tpo.client.types import TERMINAL, Candidate, Event, Iteration, Job, Status

DEFAULT_URL = "http://127.0.0.1:8000"
LONG_POLL_SECONDS = 10.0
_PAGE = 100

Body = Mapping[str, Any]
"""The JSON of a submission; only `input` is needed."""
Show = Callable[[Job], object]


class Client:
    """Jobs over HTTP. Threads may share one. Close it, or use it in a `with` statement.

    Whatever fails for a moment is tried again up to `retries` times, with jitter, and not before `Retry-After`.
    `timeout` is for one answer, in seconds; for how long a job may take see `wait`. Every method raises ClientError.
    """

    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, *, retries: int = 5, timeout: float = 30.0
    ) -> None:
        self._transport = Transport(url, api_key, retries=retries, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def submit(self, job: str | Body, *, idempotency_key: str | None = None, **fields: Any) -> Job:
        """A new job, of a prompt or of a whole body; `fields` are more of the body's fields, where it has none.

        However often the request must be sent, it makes one job. With a key of your own that holds over calls too.
        """
        if not isinstance(job, str | Mapping):
            raise ClientError(f"a job is a prompt or the body of a request, and no {type(job).__name__}")
        body = {**fields, **({"input": job} if isinstance(job, str) else job)}
        return cast(Job, self._transport.post("/v1/jobs", body, _once(idempotency_key)))

    def get(self, job: str | Job) -> Job:
        """The job as it is now."""
        return cast(Job, self._transport.json("GET", _path(job)))

    def wait(self, job: str | Job, *, progress: Show | None = None, timeout: float | None = None) -> Job:
        """The job when it has ended, however it ended. `progress` is called with it whenever it has changed.

        Raises WaitTimeoutError after `timeout` seconds; the job goes on.
        """
        return self._wait(job, progress, timeout, threading.Event())

    def wait_all(
        self, jobs: Iterable[str | Job], *, progress: Show | None = None, in_flight: int = 32
    ) -> builtins.list[Job]:
        """The jobs, in their order, when all have ended; `in_flight` of them are asked after at a time."""
        turn = threading.Lock()

        def show(job: Job) -> None:
            with turn:
                if progress is not None:
                    progress(job)

        def one(job: str | Job, left: threading.Event) -> Job:
            return self._wait(job, show, None, left)

        return [*flow(jobs, one, at_once=in_flight, in_order=True)]

    def events(self, job: str | Job, *, starting_after: int = 0) -> Iterator[Event]:
        """What happens to the job, as it happens, to its last event: each once, also when the connection is cut."""
        return follow(self._transport, _path(job), starting_after)

    def cancel(self, job: str | Job) -> Job:
        """Ask for the job's end. One that has ended stays as it is."""
        return cast(Job, self._transport.json("POST", f"{_path(job)}/cancel"))

    def pause(self, job: str | Job) -> Job:
        """Hold the job: at once while it waits, within one model call while it runs."""
        return cast(Job, self._transport.json("POST", f"{_path(job)}/pause"))

    def resume(self, job: str | Job) -> Job:
        """Let a paused job go on from where it stopped."""
        return cast(Job, self._transport.json("POST", f"{_path(job)}/resume"))

    def retry(self, job: str | Job, *, idempotency_key: str | None = None) -> Job:
        """Try again: a job that waits for an attempt waits no longer; of one without success a new one is made."""
        return cast(Job, self._transport.json("POST", f"{_path(job)}/retry", headers=_once(idempotency_key)))

    def extend(self, job: str | Job, iterations: int, *, idempotency_key: str | None = None) -> Job:
        """A new job that goes on from one that has ended, for so many more iterations."""
        body, headers = {"iterations": iterations}, _once(idempotency_key)
        return cast(Job, self._transport.post(f"{_path(job)}/extend", body, headers))

    def delete(self, job: str | Job) -> None:
        """Forget a job that has ended, with all its texts."""
        # Not there at a second try: the first one came through, and its answer was lost.
        self._transport.ask("DELETE", _path(job), settled=frozenset({httpx.codes.NOT_FOUND}))

    def iterations(self, job: str | Job) -> builtins.list[Iteration]:
        """The job's record: whom each iteration compared, what was said, its rewards."""
        return cast(builtins.list[Iteration], self._transport.json("GET", f"{_path(job)}/iterations")["data"])

    def candidates(self, job: str | Job) -> builtins.list[Candidate]:
        """All responses of the job, with their texts and rewards."""
        return cast(builtins.list[Candidate], self._transport.json("GET", f"{_path(job)}/candidates")["data"])

    def list(
        self,
        *,
        status: Status | Sequence[Status] = (),
        metadata: Mapping[str, str] | None = None,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """Jobs, the newest first, or with `order="asc"` the oldest; page after page is fetched as it is needed."""
        left = limit
        pairs = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        while left is None or left > 0:
            query: dict[str, Any] = {"order": order, "limit": _PAGE if left is None else min(left, _PAGE), **pairs}
            query |= {"status": status} if status else {}
            query |= {"after": after} if after else {}
            page = self._transport.json("GET", "/v1/jobs", params=query)
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]
            left = None if left is None else left - len(page["data"])

    def batch(
        self,
        rows: Iterable[Row],
        make: Callable[[Row], str | Body] | None = None,
        *,
        in_flight: int = 16,
        in_order: bool = True,
        progress: Show | None = None,
        **fields: Any,
    ) -> Iterator[Result[Row]]:
        """Submit a job of each row and wait for it; gives results in the order of the rows, or as they come.

        `rows`: any iterable, a Hugging Face dataset too; a row is drawn only when fewer than `in_flight` jobs run.
        `make` turns a row into a prompt or a body; without it the row is one. `fields` go into every body that has
        none of its own. A row that fails has its error in its result and disturbs no other.
        """

        def one(numbered: tuple[int, Row], left: threading.Event) -> Result[Row]:
            index, row = numbered
            job: Job | None = None
            try:
                job = self.submit(cast(str | Body, row) if make is None else make(row), **fields)
                job = self._wait(job, progress, None, left)
            except ClientError as error:
                return Result(index, row, job, error)
            return Result(index, row, job, None if job["status"] == "completed" else JobFailedError(job))

        return flow(enumerate(rows), one, at_once=in_flight, in_order=in_order)

    def _wait(self, job: str | Job, progress: Show | None, timeout: float | None, left: threading.Event) -> Job:
        end = None if timeout is None else time.monotonic() + timeout
        tag: str | None = None
        path = _path(job)
        while True:
            rest = LONG_POLL_SECONDS if end is None else max(0.0, min(LONG_POLL_SECONDS, end - time.monotonic()))
            # The first answer comes at once, each later one when there is news.
            headers, query = ({}, {}) if tag is None else ({"if-none-match": tag}, {"wait": round(rest, 3)})
            response = self._transport.ask("GET", path, patience=rest, headers=headers, params=query)
            if response.status_code != httpx.codes.NOT_MODIFIED:
                tag = response.headers.get("etag")
                known: Job = self._transport.parsed(response)
                if progress is not None:
                    progress(known)
                if known["status"] in TERMINAL:
                    return known
            if left.is_set() or (end is not None and time.monotonic() >= end):
                raise WaitTimeoutError(f"{job if isinstance(job, str) else job['id']} has not ended in that time")


def _path(job: str | Job) -> str:
    # Half a surrogate pair stands in no id, and a question mark in none either.
    return f"/v1/jobs/{quote(job if isinstance(job, str) else job['id'], safe='', errors='replace')}"


def _once(idempotency_key: str | None) -> dict[str, str]:
    return {"idempotency-key": idempotency_key or uuid.uuid4().hex}
