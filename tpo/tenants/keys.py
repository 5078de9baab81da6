"""API keys: create, list, revoke and look up."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Select, insert, select, update

from tpo.core.errors import InvalidInputError, KeyNotFoundError
from tpo.db import Queries, now, reading, writing
from tpo.tenants.tables import ApiKey
from tpo.tenants.tenants import ensure_tenant

_KEY_BYTES = 32


class NewKey(NamedTuple):
    """A new key, and the only time that its secret can be read."""

    row: ApiKey
    secret: str


class KeyQueries(Queries):
    """The part of the store that authenticates requests."""

    def create(self, name: str, tenant: str) -> NewKey:
        """Create a key, and its tenant if that is new. Raises InvalidInputError."""
        if not 0 < len(name) <= 200 or "\x00" in name:
            raise InvalidInputError("A key's name has 1 to 200 characters.", "name")
        secret = f"tpo_{secrets.token_urlsafe(_KEY_BYTES)}"
        key_id = f"key_{secrets.token_hex(12)}"
        with writing(self._engine) as session:
            ensure_tenant(session, tenant)
            values = {"id": key_id, "tenant": tenant, "name": name, "hash": _hash(secret), "created_at": now()}
            session.execute(insert(ApiKey).values(values))
            return NewKey(session.get_one(ApiKey, key_id), secret)

    def page(self) -> Sequence[ApiKey]:
        """Return all keys of all tenants, the oldest first."""
        with reading(self._engine) as session:
            return session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)).all()

    def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key; a revoked one is not changed. Raises KeyNotFoundError."""
        with writing(self._engine) as session:
            which = (ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
            session.execute(update(ApiKey).where(*which).values(revoked_at=now()))
            key = session.get(ApiKey, key_id)
            if key is None:
                raise KeyNotFoundError(f"There is no key {key_id!r}.")
            return key

    def tenant_of(self, secret: str) -> str | None:
        """Return the tenant of a secret; None if no valid key matches."""
        return self._one(select(ApiKey.tenant).where(ApiKey.hash == _hash(secret), ApiKey.revoked_at.is_(None)))

    def any_exists(self) -> bool:
        """Return whether a key was ever created: revoking the last one does not open the server."""
        return self._one(select(ApiKey.tenant).limit(1)) is not None

    def _one(self, query: Select[str]) -> str | None:
        with reading(self._engine) as session:
            return session.scalars(query).one_or_none()


def _hash(secret: str) -> str:
    # A key is 256 random bits: it cannot be guessed from a fast hash, and every request would pay for a slow one.
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
