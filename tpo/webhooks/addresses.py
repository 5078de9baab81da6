"""Checks of the addresses of webhooks: only public ones may be called, because users choose them."""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from tpo.core.errors import InvalidInputError

_URL = re.compile(r"https?://[!-~]+", re.IGNORECASE)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Return whether an address, and any address embedded in it, belongs to the public Internet."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(inner) for inner in embedded if inner is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast and not address.is_reserved


def check_url(url: str, *, allow_private: bool) -> None:
    """Check the URL of a webhook by its text. Raises InvalidInputError if events cannot be sent to it.

    Host names are resolved and checked at each delivery, because their addresses can change until then.
    """
    if not _URL.fullmatch(url):
        raise InvalidInputError("url: must start with https:// or http:// and contain only printable ASCII.", "url")
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError:
        raise InvalidInputError("url: is not a valid address.", "url") from None
    if not host or parts.username is not None or parts.password is not None or parts.fragment:
        raise InvalidInputError("url: must name a host, and contain no user, password or fragment.", "url")
    if allow_private:
        return
    try:
        private = not is_public(_literal_address(host))
    except ValueError:
        private = host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")
    if private:
        raise InvalidInputError("url: is not a public address.", "url")


def _literal_address(host: str) -> Address:
    """Parse a literal address, also in old notations: 127.1, 0x7f000001. Raises ValueError for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            raise ValueError(f"{host!r} is not an address") from None
