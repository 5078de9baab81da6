"""A circuit breaker for one server. While the server is down, one request at a time probes it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

FAILURES = 8
"""Consecutive failures, over all jobs, after which the circuit opens."""


class ServerDownError(Exception):
    """The server could not be reached, or failed. A retry may help, and serves as a probe."""


class Breaker:
    """Circuit breaker with two states.

    Closed: every request passes. Open: after a pause that doubles each time, one request passes as a probe, while the
    others wait for its result. An instance belongs to one event loop. A request whose time runs out stops waiting, like
    any other cancelled request.
    """

    def __init__(self, first_pause: float, longest_pause: float) -> None:
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._pause = first_pause
        self._failures = 0
        self._probe_at = 0.0
        self._probing = False
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Return True while requests must wait for a probe to succeed."""
        return self._failures >= FAILURES

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        """Wait until a request may be sent. Only a `ServerDownError` raised in the body counts as a failure."""
        is_probe = await self._wait()
        try:
            yield
        except ServerDownError:
            self._record_failure(is_probe)
            raise
        except Exception:  # A refusal also proves that the server is up. Cancellation (a BaseException) proves nothing.
            self._record_success()
            raise
        else:
            self._record_success()
        finally:
            if is_probe:
                self._probing = False
                self._notify()

    async def _wait(self) -> bool:
        """Wait until a request may be sent. Return whether this request is the probe."""
        loop = asyncio.get_running_loop()
        while self.is_open:
            left = self._probe_at - loop.time()
            if left <= 0 and not self._probing:
                self._probing = True
                return True
            changed = self._changed
            try:
                async with asyncio.timeout(left if left > 0 else None):
                    await changed.wait()
            except TimeoutError:
                continue
        return False

    def _record_success(self) -> None:
        if self.is_open:
            self._notify()
        self._failures = 0
        self._pause = self._first_pause

    def _record_failure(self, was_probe: bool) -> None:
        was_open = self.is_open
        self._failures += 1
        if self.is_open and (was_probe or not was_open):
            self._probe_at = asyncio.get_running_loop().time() + self._pause
            self._pause = min(2 * self._pause, self._longest_pause)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
