"""One HTTP server that holds a model: a pool of connections, time limits, tries, and a thread that waits for all jobs.

All requests run on one event loop in one thread; a job's thread waits there for its own and can leave at any time,
which closes the connection: vLLM, SGLang and llama.cpp then stop what they were writing.
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

_BUSY = 429
_LATER = frozenset({408, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)
_SHOWN = 300
_CLOSED = "The connection to the model's server was closed."
_EXCEEDED = "exceed_context_size_error"
"""llama.cpp says so with 500 in some versions."""

T = TypeVar("T")
Item = TypeVar("Item")
Read = Callable[[Any], T]


class Malformed(Exception):
    """A reply that is not what was asked for; its message says what is wrong, and quotes nothing."""


class Refused(Exception):
    """The server understood, and said no: another try gives the same. `said` is its own message, which may quote."""

    def __init__(self, status: int, said: str, code: str) -> None:
        super().__init__(f"refused with {status}")
        self.status = status
        self.said = said
        self.code = code


@dataclass(frozen=True)
class Limits:
    """How long a server is waited for. All in seconds, but for `tries` and `connections`."""

    connect: float = 5.0
    read: float = 300.0
    call: float = 900.0
    tries: int = 6
    connections: int = 256
    pause: float = 0.5
    longest_pause: float = 20.0


class _Again(ServerDownError):
    def __init__(self, why: str, *, reached: bool = True, malformed: bool = False) -> None:
        super().__init__(why)
        self.reached = reached
        self.malformed = malformed


class _Busy(Exception):
    """Too many requests, or a pause asked for: the server lives."""

    def __init__(self, status: int, retry_after: float | None) -> None:
        super().__init__(f"is busy ({status})")
        self.retry_after = retry_after


class Server:
    """A server at one address. Any thread may call."""

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
        """Do it on the server's loop. What `interrupt` raises cancels it."""
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
        """Close the connections; what waits ends with BackendUnavailableError."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def get(self, path: str, read: Read[T], seconds: float | None = None) -> T:
        """What `read` makes of the answer. Raises like `post`."""
        return await self._insist("GET", path, None, read, seconds or self._limits.call)

    async def post(self, path: str, body: dict[str, Any], read: Read[T]) -> T:
        """What `read` makes of the answer; it raises Malformed for one that is none.

        Tries again, with growing pauses and jitter, what may pass: no connection, an answer cut short, 429 (when it
        says so), 5xx. Raises Refused, BadReplyError, BackendUnavailableError.
        """
        return await self._insist("POST", path, body, read, self._limits.call)

    async def _insist(self, method: str, path: str, body: dict[str, Any] | None, read: Read[T], seconds: float) -> T:
        why = "has answered nobody lately" if self._breaker.is_open else "did not answer in time"
        end = time.monotonic() + seconds
        pauses, tries = 0, 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        async with self._breaker.turn():
                            return await self._once(method, path, body, read)
                    except _Busy as busy:
                        why, wait = str(busy), busy.retry_after
                    except _Again as error:
                        why, wait = str(error), None
                        tries += error.reached
                        if tries >= self._limits.tries:
                            raise self._given_up(why, malformed=error.malformed) from error
                    if wait is None:
                        limits = self._limits
                        wait = backoff_seconds(pauses, first=limits.pause, longest=limits.longest_pause)
                        pauses += 1
                    else:
                        wait *= random.uniform(1, 1.1)  # noqa: S311 - jitter
                    if time.monotonic() + wait > end:
                        raise self._given_up(f"{why}; no further try fits into {seconds:g} s", malformed=False)
                    _log.info("the server of the model at %s %s; trying again in %.1f s", self.url, why, wait)
                    await asyncio.sleep(wait)
        except TimeoutError as error:
            raise self._given_up(f"{why}; {seconds:g} s are over", malformed=False) from error

    def _given_up(self, why: str, *, malformed: bool) -> BackendUnavailableError | BadReplyError:
        told = f"The server of the model at {self.url} {why}."
        return BadReplyError(told) if malformed else BackendUnavailableError(told)

    async def _once(self, method: str, path: str, body: dict[str, Any] | None, read: Read[T]) -> T:
        try:
            response = await self._client.request(method, f"{self.url}/{path}", json=body)
        except _UNREACHED as error:
            raise _Again(f"cannot be reached ({type(error).__name__})", reached=False) from error
        except httpx.RequestError as error:
            raise _Again(f"broke off ({type(error).__name__})") from error
        status = response.status_code
        said, code = _said(response) if not response.is_success else ("", "")
        if status == _BUSY:
            if "insufficient_quota" in code:
                raise Refused(status, said, code)
            raise _Busy(status, retry_after(response.headers))
        if status in _LATER and _EXCEEDED not in code:
            if (wait := retry_after(response.headers)) is not None:
                raise _Busy(status, wait)
            raise _Again(f"answered {status}")
        if not response.is_success:
            raise Refused(400 if _EXCEEDED in code else status, said, code)
        try:
            return read(json.loads(response.content))
        except (ValueError, RecursionError) as error:
            raise _Again("answered something that is not JSON", malformed=True) from error
        except Malformed as error:
            raise _Again(f"answered, but {error}", malformed=True) from error

    async def _open(self) -> tuple[httpx.AsyncClient, Breaker]:
        limits = self._limits
        client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            # Waiting for a free connection is part of the call, which has its own limit.
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


async def all_of(ask: Callable[[Item], Coroutine[Any, Any, T]], items: Sequence[Item]) -> list[T]:
    """What each item gives, in their order, asked for at once; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(ask(item)) for item in items]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def retry_after(headers: httpx.Headers) -> float | None:
    """The seconds that a server asks to be left alone, as a number or a date (RFC 9110, 10.2.3)."""
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
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - time.time()


def _said(response: httpx.Response) -> tuple[str, str]:
    """A refusal's message and code, in the shapes of OpenAI, vLLM, SGLang, llama.cpp and FastAPI."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:_SHOWN], ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:_SHOWN], ""
    message = error.get("message") or error.get("detail") or ""
    codes = [str(error.get(name)) for name in ("code", "type") if isinstance(error.get(name), str)]
    counts = [f"{name}: {error[name]}" for name in ("n_ctx", "n_prompt_tokens") if isinstance(error.get(name), int)]
    return " ".join([str(message)[: 4 * _SHOWN], *counts]), " ".join(codes)
