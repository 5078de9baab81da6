"""Which addresses a user may have us call: those that anybody could."""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from tpo.core.errors import InvalidInputError

_URL = re.compile(r"https?://[!-~]+", re.IGNORECASE)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is one of the public Internet, also where it wraps another one."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(inner) for inner in wrapped if inner is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast and not address.is_reserved


def check_url(url: str, *, allow_private: bool) -> None:
    """Raise InvalidInputError unless events can be sent to this address, as far as its text alone tells.

    What a name means is looked at when something is sent, each time: until then it may change.
    """
    if not _URL.fullmatch(url):
        raise InvalidInputError("url: must begin with https:// or http:// and hold printable ASCII alone.", "url")
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError:
        raise InvalidInputError("url: is not a valid address.", "url") from None
    if not host or parts.username is not None or parts.password is not None or parts.fragment:
        raise InvalidInputError("url: must name a host, and hold neither user, password nor fragment.", "url")
    if allow_private:
        return
    try:
        private = not is_public(_written(host))
    except ValueError:
        private = host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")
    if private:
        raise InvalidInputError("url: is no public address.", "url")


def _written(host: str) -> Address:
    """The address that a host is written as, in the old ways too: 127.1, 0x7f000001. Raises ValueError of a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            raise ValueError(f"{host!r} is no address") from None
