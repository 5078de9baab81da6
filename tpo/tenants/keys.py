"""API keys: create, list, revoke and look up."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import insert, select, update

from tpo.core.errors import InvalidInputError, KeyExpiredError, KeyNotFoundError
from tpo.db import Queries, now, reading, writing
from tpo.tenants.tables import ApiKey
from tpo.tenants.tenants import ensure_tenant

_KEY_BYTES = 32
_MAX_LIFETIME_SECONDS = 36_525 * 86_400.0


class NewKey(NamedTuple):
    """A new key with its secret, which cannot be read again."""

    row: ApiKey
    secret: str


class KeyQueries(Queries):
    """The part of the store that authenticates requests."""

    def create(self, name: str, tenant: str, *, expires_in: float | None = None) -> NewKey:
        """Create a key, and its tenant if that is new. `expires_in` is in seconds; None: the key never expires.

        Raises InvalidInputError if a name or `expires_in` is invalid.
        """
        if not 0 < len(name) <= 200 or "\x00" in name:
            raise InvalidInputError("A key's name has 1 to 200 characters.", "name")
        if expires_in is not None and not 0 < expires_in <= _MAX_LIFETIME_SECONDS:
            raise InvalidInputError("A key expires in more than 0 seconds and at most 100 years.", "expires_in")
        secret = f"tpo_{secrets.token_urlsafe(_KEY_BYTES)}"
        key_id = f"key_{secrets.token_hex(12)}"
        with writing(self._engine) as session:
            ensure_tenant(session, tenant)
            values = {"id": key_id, "tenant": tenant, "name": name, "hash": _hash(secret), "created_at": now()}
            if expires_in is not None:
                values["expires_at"] = now() + expires_in
            session.execute(insert(ApiKey).values(values))
            return NewKey(session.get_one(ApiKey, key_id), secret)

    def page(self) -> Sequence[ApiKey]:
        """Return the keys of all tenants, the oldest first."""
        with reading(self._engine) as session:
            return session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)).all()

    def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key; one that is already revoked does not change. Raises KeyNotFoundError."""
        with writing(self._engine) as session:
            which = (ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
            session.execute(update(ApiKey).where(*which).values(revoked_at=now()))
            key = session.get(ApiKey, key_id)
            if key is None:
                raise KeyNotFoundError(f"There is no key {key_id!r}.")
            return key

    def tenant_of(self, secret: str) -> str | None:
        """Return the tenant of a secret; None if no key matches or it is revoked.

        Raises KeyExpiredError if the key has expired, by the database's clock.
        """
        expired = (ApiKey.expires_at <= now()).label("expired")
        query = select(ApiKey.tenant, expired).where(ApiKey.hash == _hash(secret), ApiKey.revoked_at.is_(None))
        with reading(self._engine) as session:
            found = session.execute(query).one_or_none()
        if found is None:
            return None
        if found.expired:
            raise KeyExpiredError()
        tenant: str = found.tenant
        return tenant

    def any_exists(self) -> bool:
        """Return whether a key was ever created: revoking the last one does not open the server."""
        with reading(self._engine) as session:
            return session.scalars(select(ApiKey.id).limit(1)).one_or_none() is not None


def _hash(secret: str) -> str:
    # A key is 256 random bits: it cannot be guessed from a fast hash, and every request would pay for a slow one.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
