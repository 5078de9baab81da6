"""Tests of the Host and Origin headers that a server accepts."""

import pytest

from tpo.origins import is_foreign, is_host_allowed

LOOPBACK = ["127.0.0.1:8000", "127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.9.9.9"]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "10.0.0.1", "["]


@pytest.mark.parametrize("host", LOOPBACK)
@pytest.mark.parametrize("allowed", [(), ("tpo.example",)])
def test_loopback_names_are_always_allowed(host: str, allowed: tuple[str, ...]) -> None:
    assert is_host_allowed(host, "127.0.0.1", allowed)


@pytest.mark.parametrize("host", FOREIGN)
def test_server_on_loopback_refuses_other_names(host: str) -> None:
    for bound_to in ("127.0.0.1", "::1", "localhost"):
        assert not is_host_allowed(host, bound_to, ())
        assert not is_host_allowed(host, bound_to, ("tpo.example", "*.tpo.example"))
        assert is_host_allowed(host, bound_to, ("*",))


@pytest.mark.parametrize("host", FOREIGN)
def test_server_on_other_addresses_answers_to_all_names_by_default(host: str) -> None:
    assert is_host_allowed(host, "0.0.0.0", ())
    assert not is_host_allowed(host, "0.0.0.0", ("tpo.example",))


def test_allowed_names_are_compared_whole() -> None:
    allowed = ("tpo.example", "*.tpo.example", "10.0.0.1")
    for host in ("tpo.example", "TPO.example:443", "a.tpo.example", "a.b.tpo.example:1", "10.0.0.1:8000"):
        assert is_host_allowed(host, "127.0.0.1", allowed)
    for host in ("eviltpo.example", "tpo.example.evil", "10.0.0.11"):
        assert not is_host_allowed(host, "127.0.0.1", allowed)


HOST = {"host": "127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),
        ({"origin": "http://127.0.0.1:8000"}, False),
        ({"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"}, True),
        ({"origin": "https://evil.example"}, True),
        ({"origin": "null"}, True),
        ({"origin": ""}, True),
        ({"origin": "http://["}, True),
        ({"sec-fetch-site": "cross-site"}, True),
        ({"origin": "http://127.0.0.1:8000", "sec-fetch-site": "cross-site"}, True),
        ({"origin": "https://app.example", "sec-fetch-site": "cross-site"}, False),
    ],
)
def test_change_by_a_foreign_page_is_recognized(headers: dict[str, str], foreign: bool) -> None:
    for method in ("POST", "PATCH", "DELETE", "PUT"):
        assert is_foreign(method, {**HOST, **headers}, ("https://app.example",)) == foreign
    for method in ("GET", "HEAD", "OPTIONS"):
        assert not is_foreign(method, {**HOST, **headers}, ())


def test_all_origins_can_be_allowed() -> None:
    assert not is_foreign("POST", {**HOST, "origin": "https://any.example", "sec-fetch-site": "cross-site"}, ("*",))
    assert is_foreign("POST", {**HOST, "sec-fetch-site": "cross-site"}, ("*",))
