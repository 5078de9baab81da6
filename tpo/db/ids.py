"""Identifiers that sort by the time of their creation."""

import secrets


def new_id(prefix: str, seconds: float) -> str:
    """Return an id that cannot be guessed: the prefix, 48 bits of milliseconds, 80 random bits."""
    return f"{id_at(prefix, seconds)}{secrets.token_hex(10)}"


def id_at(prefix: str, seconds: float) -> str:
    """Return the common prefix of the ids created at that time. Ids that sort after it are not older."""
    return f"{prefix}{int(seconds * 1000):012x}"
