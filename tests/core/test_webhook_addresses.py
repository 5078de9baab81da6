"""Targets of webhooks: which addresses are public by the IANA registries, and which spellings and ports are accepted.

`tests/data/special_addresses.csv` holds the rows of the IPv4 and IPv6 special-purpose address registries of 2025-10-09
(https://www.iana.org/assignments/iana-ipv4-special-registry and iana-ipv6-special-registry), and blocks of the registry
of the IPv6 address space that are not assigned for unicast. 64:ff9b::/96 is a table of its own here: NAT64 is globally
reachable as far as the embedded IPv4 address is.
"""

import csv
import ipaddress
import socket
from pathlib import Path

import pytest

from tpo.core.errors import InvalidInputError
from tpo.settings import Settings
from tpo.webhooks.addresses import AllowedTargets, check_url, is_public, literal_address

REGISTRY = Path(__file__).parents[1] / "data" / "special_addresses.csv"
ANY_PORT = AllowedTargets()


def rows() -> list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, bool]]:
    """Read the registries: blocks, and whether they are globally reachable."""
    with REGISTRY.open(newline="") as file:
        return [
            (ipaddress.ip_network(row["block"]), row["globally_reachable"] == "True") for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize(("block", "reachable"), [pytest.param(*row, id=str(row[0])) for row in rows()])
def test_registered_block_is_public_if_reachable(
    block: ipaddress.IPv4Network | ipaddress.IPv6Network, reachable: bool
) -> None:
    inner = {other for other, _ in rows() if other != block and other.version == block.version}
    step = max(1, block.num_addresses // 64)
    for offset in {0, block.num_addresses - 1, *range(0, block.num_addresses, step)}:
        address = block[offset]
        if not any(address in other and other.prefixlen > block.prefixlen for other in inner):
            assert is_public(address) is reachable, address


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "93.184.215.14", "100.63.255.255", "100.128.0.0"),
        *("126.255.255.255", "128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"),
        *("191.255.255.255", "192.0.0.9", "192.0.0.10", "192.0.1.0", "192.0.3.0", "192.31.196.1", "192.52.193.1"),
        *("192.88.98.255", "192.88.100.0", "192.167.255.255", "192.169.0.0", "192.175.48.6", "198.17.255.255"),
        *("198.20.0.0", "198.51.99.255", "198.51.101.0", "203.0.112.255", "203.0.114.0", "223.255.255.255"),
        *("2000::1", "2001:200::1", "2001:4860:4860::8888", "2003::1", "2606:4700:4700::1111", "2620:4f:8000::1"),
        *("2001:1::1", "2001:3::1", "2001:4:112::1", "2001:20::1", "2001:3f::1", "2a00:1450:4001:81b::200e"),
        *("2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db9::", "2001:ffff::1", "3ffe:ffff::1", "3fff:1000::1"),
        *("64:ff9b::1.1.1.1", "64:ff9b::808:808", "64:ff9b::192.0.0.9"),
    ],
)
def test_globally_reachable_address_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.255.255.255", "10.0.0.0", "10.255.255.255", "100.64.0.1", "100.127.255.255", "127.0.0.1"),
        *("127.255.255.254", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.0", "192.0.0.8"),
        *("192.0.0.11", "192.0.0.170", "192.0.0.171", "192.0.0.192", "192.0.0.255", "192.0.2.1", "192.88.99.0"),
        *("192.88.99.1", "192.88.99.2", "192.88.99.255", "192.168.0.1", "198.18.0.1", "198.19.255.255"),
        *("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9a::1"),
        *("64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::192.0.0.192"),
        *("64:ff9b:0:0:0:1::1", "64:ff9b:1::1.1.1.1", "64:ff9b:1:ffff::1", "100::1", "100:0:0:1::1", "200::1"),
        *("1fff::1", "2001::1", "2001:0:7f00:1::", "2001:1::", "2001:1::4", "2001:2::1", "2001:10::1", "2001:4::1"),
        *("2001:1ff:ffff::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1", "3fff::1", "3fff:fff:ffff::1"),
        *("4000::1", "5f00::1", "8000::1", "fc00::1", "fd00:ec2::254", "fe00::1", "fe80::1", "febf::1", "fec0::1"),
        *("feff::1", "ff02::1", "ff0e::1"),
    ],
)
def test_special_address_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7F.1", "0x7f.0x0.0x0.0x1", "017700000001"),
        *("0177.0.0.1", "0177.0x0.1", "127.0.0.1.", "0", "0.0", "0x0", "10.1", "0xa9fea9fe", "2852039166", "0xC0.192"),
        *("192.0.0.192", "3221225664", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[::FFFF:7F00:1]"),
        *("[::ffff:0:7f00:1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::808:808]", "[2002:7f00:1::]", "[fec0::1]"),
        *("[3fff::1]", "[fe80::1%25eth0]", "[fe80::1%eth0]", "[2606:4700::1%25eth0]", "[2606:4700::1%1]"),
        *("localhost", "LOCALHOST", "localhost.", "sub.localhost", "sub.localhost."),
    ],
)
def test_private_host_is_refused_in_any_spelling(host: str) -> None:
    with pytest.raises(InvalidInputError, match="not a public address"):
        check_url(f"https://{host}/in", ANY_PORT)
    check_url(f"https://{host}/in", AllowedTargets(private=True))


@pytest.mark.parametrize("host", ["8.8.8.8", "134744072", "0x8.8.0x808", "010.8.8.8", "[2606:4700::1111]", "1.1"])
def test_public_host_is_accepted_in_any_spelling(host: str) -> None:
    check_url(f"http://{host}/", ANY_PORT)


@pytest.mark.parametrize(
    "host", ["127%2e0.0.1", "a..b", "a,b", "a;b", "a|b", "exa\\mple", "[v1.x:y]", "127.0.0.1\\.example", "*", "a%00b"]
)
def test_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(InvalidInputError, match="url: "):
        check_url(f"https://{host}/", AllowedTargets(private=True))


@pytest.mark.parametrize(
    "spelling", ["127.1", "2130706433", "0x7f.1", "0177.0.0.01", "127.0.0.1", "0x7f000001", "017700000001"]
)
def test_old_notations_mean_what_the_resolver_takes_them_for(spelling: str) -> None:
    assert literal_address(spelling) == socket.getaddrinfo(spelling, 80)[0][4][0]


def test_ports_outside_the_setting_are_refused() -> None:
    allowed = AllowedTargets.from_settings(Settings())
    for url in ("http://example.com/", "https://example.com/", "http://a.example:8080", "https://[2606:4700::1]:8443/"):
        check_url(url, allowed)
    for port in (0, 22, 25, 81, 6379, 5432, 65535):
        with pytest.raises(
            InvalidInputError, match=rf"port {port} is not allowed. TPO_WEBHOOK_PORTS allows 80, 443, 8080, 8443\."
        ):
            check_url(f"http://example.com:{port}/", allowed)
    check_url("http://example.com:9000/", AllowedTargets.from_settings(Settings(webhook_ports="80, 9000")))
    check_url("http://example.com:22/", AllowedTargets.from_settings(Settings(webhook_ports="any")))
    with pytest.raises(InvalidInputError, match="port 443"):
        check_url("https://example.com/", AllowedTargets(ports=frozenset({80})))


@pytest.mark.parametrize("ports", ["", "0", "65536", "http", "80;443", "80,", "any,80"])
def test_invalid_ports_are_refused_by_the_settings(ports: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPO_WEBHOOK_PORTS", ports)
    with pytest.raises(ValueError, match="webhook_ports"):
        Settings()
