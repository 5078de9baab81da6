"""Authentication: find the tenant of a request by its API key. Results are cached for a few seconds."""

import hmac
import time

from cachetools import TTLCache
from starlette.concurrency import run_in_threadpool

from tpo.db import DEFAULT_TENANT
from tpo.settings import Settings
from tpo.store import Store

_REMEMBER_SECONDS = 5.0
"""Maximum delay until a process rejects a revoked or expired key, or requires keys after the first was created."""

_REMEMBER_KEYS = 10_000


class Authenticator:
    """Finds the tenant of a key, with a cache. Not thread-safe: use it only in the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._own = settings.api_key.get_secret_value().encode() if settings.api_key else None
        self._always = settings.api_key is not None or settings.require_key
        self._known: TTLCache[str, str] = TTLCache(_REMEMBER_KEYS, _REMEMBER_SECONDS, timer=lambda: time.monotonic())
        self._open_until = 0.0

    async def tenant(self, store: Store, authorization: str) -> str | None:
        """Return the tenant of a request by its Authorization header, or None.

        Raises KeyExpiredError and StoreUnavailableError.
        """
        if not self._always and await self._open(store):
            return DEFAULT_TENANT
        scheme, _, key = authorization.partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            return None
        if self._own is not None and hmac.compare_digest(key.encode("utf-8", "surrogateescape"), self._own):
            return DEFAULT_TENANT
        if (known := self._known.get(key)) is not None:
            return known
        found = await run_in_threadpool(store.keys.tenant_of, key)
        if found is not None:
            self._known[key] = found
        return found

    async def _open(self, store: Store) -> bool:
        """Return True if no key was ever created."""
        if time.monotonic() < self._open_until:
            return True
        if await run_in_threadpool(store.keys.any_exists):
            self._always = True
            return False
        self._open_until = time.monotonic() + _REMEMBER_SECONDS
        return True
