"""Checks of the Host and Origin headers: the pages of a browser that may use a server.

A page on any site can make a browser send requests to this machine. A name that resolves to it (DNS rebinding) would
let that page read the responses, so a local server answers only to its own names.
"""

from collections.abc import Mapping
from urllib.parse import urlsplit

from tpo.settings import is_loopback

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")


def is_host_allowed(host: str, bound_to: str, allowed: tuple[str, ...] | None) -> bool:
    """Return whether a server answers to a Host header.

    Without a list of allowed hosts, a server on loopback answers to loopback names only, and any other to all names:
    it needs a key, which a foreign page does not have.
    """
    name = _hostname(host)
    if is_loopback(name):
        return True
    if not allowed:
        return not is_loopback(bound_to) or name == bound_to
    return any(each == "*" or name == each or (each.startswith("*.") and name.endswith(each[1:])) for each in allowed)


def is_foreign(method: str, headers: Mapping[str, str], allowed: tuple[str, ...] | None) -> bool:
    """Return whether a page of another site asks for a change. Its own origin is that of the Host header."""
    if method in _SAFE_METHODS:
        return False
    origin, allowed = headers.get("origin"), allowed or ()
    if origin in allowed or (origin and "*" in allowed):
        return False
    if headers.get("sec-fetch-site") == "cross-site":
        return True
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
