"""Identifiers that sort by the time of their creation."""

import secrets


def new_id(prefix: str, seconds: float) -> str:
    """Return an id that cannot be guessed: a prefix, 48 bits of milliseconds, 80 random bits."""
    return f"{id_at(prefix, seconds)}{secrets.token_hex(10)}"


def id_at(prefix: str, seconds: float) -> str:
    """Return the prefix of all ids of that moment: ids that sort after it are at least as young."""
    return f"{prefix}{int(seconds * 1000):012x}"
