"""HTTP client for one model server: a connection pool, time limits and retries, shared by all jobs.

All requests run on one event loop in one thread. A job's thread waits for its own request and can cancel it at any
time, which closes the connection: vLLM, SGLang and llama.cpp then stop generating.
"""

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from tpo.backends.futures import result_of
from tpo.backends.remote.breaker import Breaker, ServerDownError
from tpo.backoff import backoff_seconds
from tpo.core.errors import BackendUnavailableError, BadReplyError
from tpo.core.ports import Interrupt

_log = logging.getLogger(__name__)

_TOO_MANY_REQUESTS = 429
_RETRYABLE = frozenset({408, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_CONNECT_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout)
_MAX_SHOWN = 300
_CLOSED = "The connection to the model's server was closed."
_EXCEEDED = "exceed_context_size_error"
"""Error code of llama.cpp, which some versions send with status 500."""

T = TypeVar("T")
Item = TypeVar("Item")
Read = Callable[[Any], T]


class Malformed(Exception):
    """A reply that is not of the requested kind. The message says what is wrong and quotes nothing of the reply."""


class Refused(Exception):
    """The server refused the request; a retry would give the same result.

    `message` is the server's own text and may quote the request.
    """

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(f"refused with {status}")
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True)
class Limits:
    """Time limits and retries of a server. All values are in seconds, except `tries` and `connections`."""

    connect: float = 5.0
    read: float = 300.0
    call: float = 900.0
    tries: int = 6
    connections: int = 256
    pause: float = 0.5
    longest_pause: float = 20.0


class _RetryableError(ServerDownError):
    """An attempt that failed; `reached` is False if there was no connection."""

    def __init__(self, why: str, *, reached: bool = True, malformed: bool = False) -> None:
        super().__init__(why)
        self.reached = reached
        self.malformed = malformed


class _BusyError(Exception):
    """The server is up but asks to wait: too many requests, or a Retry-After header."""

    def __init__(self, status: int, retry_after: float | None) -> None:
        super().__init__(f"is busy ({status})")
        self.retry_after = retry_after


class Server:
    """A server at one address. Thread-safe."""

    def __init__(self, url: str, key: str | None, limits: Limits) -> None:
        self.url = url.rstrip("/")
        self._limits = limits
        self._key = key
        self._closing = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()
        self._client, self._breaker = self.call(self._open(), lambda: None)

    def call(self, work: Coroutine[Any, Any, T], interrupt: Interrupt) -> T:
        """Run a coroutine on the server's event loop and wait for it. If `interrupt` raises, cancel the coroutine.

        Raises BackendUnavailableError if the server was closed.
        """
        with self._closing:
            if self._closed:
                work.close()
                raise BackendUnavailableError(_CLOSED)
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return result_of(future, interrupt)
        except CancelledError:
            raise BackendUnavailableError(_CLOSED) from None

    def close(self) -> None:
        """Close the connections. Pending calls raise BackendUnavailableError."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def get(self, path: str, read: Read[T], seconds: float | None = None) -> T:
        """Send a GET request and return the reply as parsed by `read`. Raises the same errors as `post`."""
        return await self._retry("GET", path, None, read, seconds or self._limits.call)

    async def post(self, path: str, body: dict[str, Any], read: Read[T]) -> T:
        """Send a POST request and return the reply as parsed by `read`, which raises Malformed for a wrong reply.

        Temporary failures are retried with growing pauses and jitter: no connection, a reply cut short, 429 (after the
        pause that it asks for) and 5xx. Raises Refused, BadReplyError, BackendUnavailableError.
        """
        return await self._retry("POST", path, body, read, self._limits.call)

    async def _retry(self, method: str, path: str, body: dict[str, Any] | None, read: Read[T], seconds: float) -> T:
        why = "has not answered any request lately" if self._breaker.is_open else "did not answer in time"
        end = time.monotonic() + seconds
        pauses, attempts = 0, 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        async with self._breaker.permit():
                            return await self._attempt(method, path, body, read)
                    except _BusyError as busy:
                        why, wait = str(busy), busy.retry_after
                    except _RetryableError as error:
                        why, wait = str(error), None
                        attempts += error.reached
                        if attempts >= self._limits.tries:
                            raise self._final_error(why, malformed=error.malformed) from error
                    if wait is None:
                        limits = self._limits
                        wait = backoff_seconds(pauses, first=limits.pause, longest=limits.longest_pause)
                        pauses += 1
                    else:
                        wait *= random.uniform(1, 1.1)  # noqa: S311 - jitter
                    if time.monotonic() + wait > end:
                        raise self._final_error(f"{why}; no further try fits into {seconds:g} s", malformed=False)
                    _log.info("the server of the model at %s %s; trying again in %.1f s", self.url, why, wait)
                    await asyncio.sleep(wait)
        except TimeoutError as error:
            raise self._final_error(f"{why}; {seconds:g} s are over", malformed=False) from error

    def _final_error(self, why: str, *, malformed: bool) -> BackendUnavailableError | BadReplyError:
        message = f"The server of the model at {self.url} {why}."
        return BadReplyError(message) if malformed else BackendUnavailableError(message)

    async def _attempt(self, method: str, path: str, body: dict[str, Any] | None, read: Read[T]) -> T:
        try:
            response = await self._client.request(method, f"{self.url}/{path}", json=body)
        except _CONNECT_ERRORS as error:
            raise _RetryableError(f"cannot be reached ({type(error).__name__})", reached=False) from error
        except httpx.RequestError as error:
            raise _RetryableError(f"failed during the request ({type(error).__name__})") from error
        status = response.status_code
        message, code = _error_message(response) if not response.is_success else ("", "")
        if status == _TOO_MANY_REQUESTS:
            if "insufficient_quota" in code:
                raise Refused(status, message, code)
            raise _BusyError(status, retry_after(response.headers))
        if status in _RETRYABLE and _EXCEEDED not in code:
            if (wait := retry_after(response.headers)) is not None:
                raise _BusyError(status, wait)
            raise _RetryableError(f"answered {status}")
        if not response.is_success:
            raise Refused(400 if _EXCEEDED in code else status, message, code)
        try:
            return read(json.loads(response.content))
        except (ValueError, RecursionError) as error:
            raise _RetryableError("answered something that is not JSON", malformed=True) from error
        except Malformed as error:
            raise _RetryableError(f"answered, but {error}", malformed=True) from error

    async def _open(self) -> tuple[httpx.AsyncClient, Breaker]:
        limits = self._limits
        client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            # The time limit of the call includes waiting for a free connection.
            timeout=httpx.Timeout(limits.read, connect=limits.connect, pool=None),
            limits=httpx.Limits(max_connections=limits.connections, max_keepalive_connections=limits.connections),
            trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),
        )
        return client, Breaker(limits.pause, limits.longest_pause)

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


async def gather_all(ask: Callable[[Item], Coroutine[Any, Any, T]], items: Sequence[Item]) -> list[T]:
    """Call `ask` for all items concurrently and return the results in order. The first failure cancels the rest."""
    tasks = [asyncio.ensure_future(ask(item)) for item in items]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds to wait from a Retry-After header, a number or a date (RFC 9110, section 10.2.3)."""
    text = headers.get("retry-after", "").strip()
    try:
        if (milliseconds := headers.get("retry-after-ms", "").strip()) and float(milliseconds) >= 0:
            return float(milliseconds) / 1000
        if not text:
            return None
        seconds = float(text) if text[0].isdigit() else _until(parsedate_to_datetime(text))
    except (ValueError, TypeError):
        return None
    return max(0.0, seconds)


def _until(moment: datetime) -> float:
    """Return the seconds from now until a moment; a moment without a time zone is UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - time.time()


def _error_message(response: httpx.Response) -> tuple[str, str]:
    """Return a refusal's message and code, in the formats of OpenAI, vLLM, SGLang, llama.cpp and FastAPI."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:_MAX_SHOWN], ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:_MAX_SHOWN], ""
    message = error.get("message") or error.get("detail") or ""
    codes = [str(error.get(name)) for name in ("code", "type") if isinstance(error.get(name), str)]
    counts = [f"{name}: {error[name]}" for name in ("n_ctx", "n_prompt_tokens") if isinstance(error.get(name), int)]
    return " ".join([str(message)[: 4 * _MAX_SHOWN], *counts]), " ".join(codes)
