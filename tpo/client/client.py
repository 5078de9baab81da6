"""The client of one server."""

import builtins
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import quote

import httpx

from tpo.client.batch import Result, Row, map_concurrently
from tpo.client.errors import ClientError, JobFailedError, WaitTimeoutError
from tpo.client.stream import follow
from tpo.client.transport import Transport
from tpo.client.types import BODY_FIELDS, TERMINAL, Candidate, Event, Iteration, Job, JobSummary, Status

DEFAULT_URL = "http://127.0.0.1:8000"
LONG_POLL_SECONDS = 10.0
_PAGE_SIZE = 100

Body = Mapping[str, Any]
"""The JSON body of a submission. Only `input` is required."""
OnProgress = Callable[[Job], object]
"""Called with a job whenever it has changed."""


class Client:
    """A client of one server. It is thread-safe. Close it, or use it in a `with` statement.

    Temporary failures are retried up to `retries` times, with jitter, and not before `Retry-After`. `timeout` is the
    time for one response, in seconds; for the time that a job may take, see `wait`. Every method raises ClientError.

        with Client("http://127.0.0.1:8000") as client:
            print(client.wait(client.submit("Why is the sky blue?"))["output"])
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
        """Submit a job: a prompt, or a whole body. `fields` are added to the body unless it has them.

        Parameters of the optimization can be given by name: `sample_size=4` is `parameters={"sample_size": 4}`.
        Retries of the request create only one job. With your own `idempotency_key`, so do repeated calls.
        """
        if not isinstance(job, str | Mapping):
            raise ClientError(f"a job must be a prompt (str) or a request body (mapping), not {type(job).__name__}")
        body = _with_fields({"input": job} if isinstance(job, str) else job, fields)
        return cast(Job, self._transport.post("/v1/jobs", body, _idempotency_headers(idempotency_key)))

    def get(self, job: str | Job) -> Job:
        """Return the current state of a job."""
        return cast(Job, self._transport.json("GET", _path(job)))

    def wait(self, job: str | Job, *, progress: OnProgress | None = None, timeout: float | None = None) -> Job:
        """Wait until a job ends, and return it, however it ended. `progress` is called whenever the job has changed.

        Raises WaitTimeoutError after `timeout` seconds; the job continues.
        """
        return self._wait(job, progress, timeout, threading.Event())

    def wait_all(
        self, jobs: Iterable[str | Job], *, progress: OnProgress | None = None, in_flight: int = 32
    ) -> builtins.list[Job]:
        """Wait until all jobs have ended, and return them in order. Up to `in_flight` of them are polled at a time."""
        lock = threading.Lock()

        def show(job: Job) -> None:
            with lock:
                if progress is not None:
                    progress(job)

        def wait_for(job: str | Job, abandoned: threading.Event) -> Job:
            return self._wait(job, show, None, abandoned)

        return [*map_concurrently(jobs, wait_for, concurrency=in_flight, in_order=True)]

    def events(self, job: str | Job, *, starting_after: int = 0) -> Iterator[Event]:
        """Iterate over the events of a job until its last one. A lost connection is resumed, without duplicates."""
        return follow(self._transport, _path(job), starting_after)

    def cancel(self, job: str | Job) -> Job:
        """Cancel a job. A job that has already ended is not changed."""
        return cast(Job, self._transport.json("POST", f"{_path(job)}/cancel"))

    def pause(self, job: str | Job) -> Job:
        """Pause a job: immediately if it waits, within one model call if it runs."""
        return cast(Job, self._transport.json("POST", f"{_path(job)}/pause"))

    def resume(self, job: str | Job) -> Job:
        """Resume a paused job where it stopped."""
        return cast(Job, self._transport.json("POST", f"{_path(job)}/resume"))

    def retry(self, job: str | Job, *, idempotency_key: str | None = None) -> Job:
        """Retry a job. A delayed retry starts now; for a job that ended without success, a new job is created."""
        return cast(
            Job, self._transport.json("POST", f"{_path(job)}/retry", headers=_idempotency_headers(idempotency_key))
        )

    def extend(self, job: str | Job, iterations: int, *, idempotency_key: str | None = None) -> Job:
        """Create a job that continues one that has ended, with this many more iterations."""
        body, headers = {"iterations": iterations}, _idempotency_headers(idempotency_key)
        return cast(Job, self._transport.post(f"{_path(job)}/extend", body, headers))

    def delete(self, job: str | Job) -> None:
        """Delete a job that has ended, with all its texts."""
        # A retry that finds no job means that the first attempt succeeded and its response was lost.
        self._transport.request("DELETE", _path(job), success_on_retry=frozenset({httpx.codes.NOT_FOUND}))

    def iterations(self, job: str | Job) -> builtins.list[Iteration]:
        """Return the iterations of a job: the compared candidates, the critique, the gradient and the rewards."""
        return cast(builtins.list[Iteration], [*self._pages(f"{_path(job)}/iterations", "number")])

    def candidates(self, job: str | Job) -> builtins.list[Candidate]:
        """Return all candidates of a job, with their texts and rewards."""
        return cast(builtins.list[Candidate], [*self._pages(f"{_path(job)}/candidates", "id")])

    def list(
        self,
        *,
        status: Status | Sequence[Status] = (),
        metadata: Mapping[str, str] | None = None,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
        limit: int | None = None,
        include: Sequence[Literal["input", "output"]] = (),
    ) -> Iterator[JobSummary]:
        """Iterate over jobs, newest first, or oldest first with `order="asc"`. Pages are fetched as they are needed.

        A job in a list has an `input_preview`; `include` brings its whole `input` or `output`.
        """
        remaining = limit
        filters = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        while remaining is None or remaining > 0:
            size = _PAGE_SIZE if remaining is None else min(remaining, _PAGE_SIZE)
            query: dict[str, Any] = {"order": order, "limit": size, **filters}
            query |= {"status": status} if status else {}
            query |= {"include": ",".join(include)} if include else {}
            query |= {"after": after} if after else {}
            page = self._transport.json("GET", "/v1/jobs", params=query)
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]
            remaining = None if remaining is None else remaining - len(page["data"])

    def batch(
        self,
        rows: Iterable[Row],
        make: Callable[[Row], str | Body] | None = None,
        *,
        in_flight: int = 16,
        in_order: bool = True,
        progress: OnProgress | None = None,
        **fields: Any,
    ) -> Iterator[Result[Row]]:
        """Submit a job for each row and wait for it. Results come in the order of the rows, or as the jobs end.

        `rows` is any iterable, such as a Hugging Face dataset. A row is read only when fewer than `in_flight` jobs run.
        `make` turns a row into a prompt or a body; without it, the row must be one. `fields` are added to each body
        unless it has them; parameters can be given by name, as in `submit`. The error of a row is in its result, and
        other rows are not affected.
        """

        def process(numbered: tuple[int, Row], abandoned: threading.Event) -> Result[Row]:
            index, row = numbered
            job: Job | None = None
            try:
                job = self.submit(cast(str | Body, row) if make is None else make(row), **fields)
                job = self._wait(job, progress, None, abandoned)
            except ClientError as error:
                return Result(index, row, job, error)
            return Result(index, row, job, None if job["status"] == "completed" else JobFailedError(job))

        return map_concurrently(enumerate(rows), process, concurrency=in_flight, in_order=in_order)

    def _pages(self, path: str, cursor: str) -> Iterator[Any]:
        """Iterate over the items of a list without a limit, page by page."""
        query: dict[str, Any] = {}
        while True:
            page = self._transport.json("GET", path, params=query)
            yield from page["data"]
            if not page["has_more"]:
                return
            query = {"after": page["data"][-1][cursor]}

    def _wait(
        self, job: str | Job, progress: OnProgress | None, timeout: float | None, abandoned: threading.Event
    ) -> Job:
        end = None if timeout is None else time.monotonic() + timeout
        tag: str | None = None
        path = _path(job)
        while True:
            seconds = LONG_POLL_SECONDS if end is None else max(0.0, min(LONG_POLL_SECONDS, end - time.monotonic()))
            # The first response comes immediately, each further one when the job has changed.
            headers, query = ({}, {}) if tag is None else ({"if-none-match": tag}, {"wait": round(seconds, 3)})
            response = self._transport.request("GET", path, extra_seconds=seconds, headers=headers, params=query)
            if response.status_code != httpx.codes.NOT_MODIFIED:
                tag = response.headers.get("etag")
                current: Job = self._transport.parse_json(response.content)
                if progress is not None:
                    progress(current)
                if current["status"] in TERMINAL:
                    return current
            if abandoned.is_set() or (end is not None and time.monotonic() >= end):
                raise WaitTimeoutError(f"{job if isinstance(job, str) else job['id']} did not end in time")


def _with_fields(body: Body, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Add fields to a body that lacks them. Every field that is not one of a body is a parameter.

    So a parameter that only a newer server knows needs no newer client, and the server refuses unknown ones by name.
    """
    named = {name: value for name, value in fields.items() if name not in BODY_FIELDS}
    merged = {**{name: value for name, value in fields.items() if name in BODY_FIELDS}, **body}
    if named:
        own = merged.get("parameters")
        if own is not None and not isinstance(own, Mapping):
            raise ClientError(f"parameters must be a mapping, not {type(own).__name__}")
        if repeated := sorted(named.keys() & (fields.get("parameters") or {}).keys()):
            raise ClientError(f"{', '.join(repeated)}: given by name and under parameters; give only one of them")
        merged["parameters"] = {**named, **(own or {})}
    return merged


def _path(job: str | Job) -> str:
    # No id contains a lone surrogate, nor the question mark that replaces it: the server answers 404.
    return f"/v1/jobs/{quote(job if isinstance(job, str) else job['id'], safe='', errors='replace')}"


def _idempotency_headers(idempotency_key: str | None) -> dict[str, str]:
    return {"idempotency-key": idempotency_key or uuid.uuid4().hex}
