"""Checks of the targets of webhooks: only public addresses and allowed ports, because users choose them."""

import ipaddress
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from tpo.core.errors import InvalidInputError
from tpo.settings import Settings

_URL = re.compile(r"https?://[!-~]+", re.IGNORECASE)
_HOST_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?")
_DEFAULT_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# "Globally Reachable" in the IANA special-purpose address registries as of 2025-10-09. Rows that a wider row decides in
# the same way are left out. What the registries call N/A or have deprecated counts as not reachable.
# https://www.iana.org/assignments/iana-ipv4-special-registry and …/iana-ipv6-special-registry
_REACHABLE: Mapping[Network, bool] = {
    ipaddress.ip_network(block): reachable
    for block, reachable in {
        "0.0.0.0/0": True,
        "0.0.0.0/8": False,  # this network
        "10.0.0.0/8": False,  # private use
        "100.64.0.0/10": False,  # shared address space
        "127.0.0.0/8": False,  # loopback
        "169.254.0.0/16": False,  # link local
        "172.16.0.0/12": False,  # private use
        "192.0.0.0/24": False,  # IETF protocol assignments
        "192.0.0.9/32": True,  # Port Control Protocol anycast
        "192.0.0.10/32": True,  # TURN anycast
        "192.0.2.0/24": False,  # documentation
        "192.88.99.0/24": False,  # deprecated 6to4 relay anycast
        "192.168.0.0/16": False,  # private use
        "198.18.0.0/15": False,  # benchmarking
        "198.51.100.0/24": False,  # documentation
        "203.0.113.0/24": False,  # documentation
        "224.0.0.0/4": False,  # multicast (RFC 5771)
        "240.0.0.0/4": False,  # reserved, and limited broadcast
        # Unicast addresses are assigned from 2000::/3 only (https://www.iana.org/assignments/ipv6-address-space).
        # The rest holds loopback, IPv4-mapped, discard-only, SRv6, unique local, link local, site local and multicast.
        "::/0": False,
        "64:ff9b::/96": True,  # NAT64, if the embedded IPv4 address is reachable
        "2000::/3": True,
        "2001::/23": False,  # IETF protocol assignments, with Teredo, benchmarking and the first ORCHID
        "2001:1::1/128": True,  # Port Control Protocol anycast
        "2001:1::2/128": True,  # TURN anycast
        "2001:1::3/128": True,  # DNS-SD Service Registration Protocol anycast
        "2001:3::/32": True,  # AMT
        "2001:4:112::/48": True,  # AS112
        "2001:20::/28": True,  # ORCHIDv2
        "2001:30::/28": True,  # Drone Remote ID
        "2001:db8::/32": False,  # documentation
        "2002::/16": False,  # 6to4
        "3fff::/20": False,  # documentation
    }.items()
}
_MOST_SPECIFIC_FIRST = sorted(_REACHABLE, key=lambda network: network.prefixlen, reverse=True)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class AllowedTargets(NamedTuple):
    """The addresses and ports that webhooks may be sent to."""

    private: bool = False
    """Whether addresses that are not public are allowed."""
    ports: frozenset[int] | None = None
    """The allowed ports; None allows all."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the allowed targets from the settings."""
        return cls(settings.webhook_allow_private, settings.webhook_ports)


class Target(NamedTuple):
    """The parts of a webhook's URL that a connection needs."""

    scheme: str
    host: str
    port: int
    path: str
    """The path and the query."""

    @property
    def authority(self) -> str:
        """Return the value of the Host header: an IPv6 address in brackets, and a port that is not the default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def is_public(address: Address) -> bool:
    """Return whether an address is globally reachable, by the most specific block that contains it."""
    if isinstance(address, ipaddress.IPv6Address) and address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return next(_REACHABLE[network] for network in _MOST_SPECIFIC_FIRST if address in network)


def is_public_text(address: str) -> bool:
    """Return whether the text is a public address. An address with a zone id (`%eth0`) belongs to one link."""
    return "%" not in address and is_public(ipaddress.ip_address(address))


def check_url(url: str, allowed: AllowedTargets) -> None:
    """Check the URL of a webhook by its text. Raises InvalidInputError if events cannot be sent to it.

    Host names are resolved and checked at each delivery, because their addresses can change until then.
    """
    if not _URL.fullmatch(url):
        raise InvalidInputError("url: must start with https:// or http:// and contain only printable ASCII.", "url")
    try:
        parts = urlsplit(url)
        target = split_url(url)
    except ValueError:
        raise InvalidInputError("url: is not a valid address.", "url") from None
    if not target.host or parts.username is not None or parts.password is not None or parts.fragment:
        raise InvalidInputError("url: must name a host, and contain no user, password or fragment.", "url")
    literal = literal_address(target.host)
    if literal is None and not _HOST_NAME.fullmatch(target.host):
        raise InvalidInputError("url: its host is neither a name nor an address.", "url")
    if allowed.ports is not None and target.port not in allowed.ports:
        ports = ", ".join(map(str, sorted(allowed.ports)))
        raise InvalidInputError(f"url: port {target.port} is not allowed. TPO_WEBHOOK_PORTS allows {ports}.", "url")
    if allowed.private:
        return
    name = target.host.rstrip(".")
    private = name == "localhost" or name.endswith(".localhost") if literal is None else not is_public_text(literal)
    if private:
        raise InvalidInputError("url: is not a public address.", "url")


def split_url(url: str) -> Target:
    """Split the URL of a webhook. Raises ValueError if it is not valid."""
    parts = urlsplit(url)
    port = _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, parts.hostname or "", port, path)


def literal_address(host: str) -> str | None:
    """Return the address that a host stands for, also in old notations (127.1, 0x7f000001), or None for a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host.removesuffix(".")))
    except OSError:
        return None
