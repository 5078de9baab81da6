"""A circuit breaker for one server: while it is down, one request at a time asks whether it is back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

FAILURES = 8
"""So many failures in a row, over all jobs, and the circuit is open."""


class ServerDownError(Exception):
    """The server could not be reached, or failed: another try may help, and tells whether it is back."""


class Breaker:
    """Closed, all go through. Open, one at a time does, after a pause that grows; the others wait for what it finds.

    It belongs to one event loop. A request whose time runs out leaves the line like any other that is cancelled.
    """

    def __init__(self, first_pause: float, longest_pause: float) -> None:
        self._first = first_pause
        self._longest = longest_pause
        self._pause = first_pause
        self._failures = 0
        self._ask_at = 0.0
        self._asking = False
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether requests have to wait for one that succeeds."""
        return self._failures >= FAILURES

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until a request may go. Only a `ServerDownError` raised in the body counts against the server."""
        asks = await self._wait()
        try:
            yield
        except ServerDownError:
            self._failed(asks)
            raise
        except Exception:  # a refusal is an answer, too; one that was cancelled says nothing
            self._closed()
            raise
        else:
            self._closed()
        finally:
            if asks:
                self._asking = False
                self._notify()

    async def _wait(self) -> bool:
        """Whether this request is the one that asks for all."""
        loop = asyncio.get_running_loop()
        while self.is_open:
            left = self._ask_at - loop.time()
            if left <= 0 and not self._asking:
                self._asking = True
                return True
            changed = self._changed
            try:
                async with asyncio.timeout(left if left > 0 else None):
                    await changed.wait()
            except TimeoutError:
                continue
        return False

    def _closed(self) -> None:
        if self.is_open:
            self._notify()
        self._failures = 0
        self._pause = self._first

    def _failed(self, asked: bool) -> None:
        was_open = self.is_open
        self._failures += 1
        if self.is_open and (asked or not was_open):
            self._ask_at = asyncio.get_running_loop().time() + self._pause
            self._pause = min(2 * self._pause, self._longest)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
