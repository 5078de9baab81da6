"""Web pages and the API: the Host and Origin headers, CORS, and the path of a proxy."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import tornado.httputil
from fastapi.testclient import TestClient
from tornado.web import ErrorHandler

from tests.support.api_client import KEY, UNKNOWN_ID, assert_problem, submit
from tpo.settings import Settings
from worker.celery.flower import make_flower

MakeClient = Callable[..., TestClient]
EVIL = "https://evil.example"
APP = "https://app.example"
CHANGES = [
    ("POST", "/v1/jobs"),
    ("POST", "/v1/files"),
    ("POST", f"/v1/jobs/{UNKNOWN_ID}/cancel"),
    ("DELETE", f"/v1/jobs/{UNKNOWN_ID}"),
    ("PATCH", "/v1/webhooks/wh_1"),
]


@pytest.fixture
def local(sqlite_client_of: MakeClient) -> TestClient:
    """Client of a server with default settings: on loopback, without a key."""
    client = sqlite_client_of(allowed_hosts="")
    client.headers["host"] = "127.0.0.1:8000"
    return client


@pytest.mark.parametrize("path", ["/v1/jobs", "/", "/docs", "/openapi.json", "/metrics", "/v1/nothing"])
def test_foreign_host_is_refused(local: TestClient, path: str) -> None:
    response = local.get(path, headers={"host": "evil.example"})
    assert_problem(response, 421, "host_not_allowed")
    assert local.get("/v1/jobs", headers={"host": "localhost:8000"}).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_answer_to_any_host(local: TestClient, path: str) -> None:
    assert local.get(path, headers={"host": "10.1.2.3:8000"}).status_code == (200 if path == "/healthz" else 503)


def test_allowed_hosts_are_a_setting(sqlite_client_of: MakeClient) -> None:
    client = sqlite_client_of(allowed_hosts="tpo.example, *.internal")
    for host, status in (("tpo.example", 200), ("a.internal:80", 200), ("127.0.0.1", 200), ("testserver", 421)):
        assert client.get("/v1/jobs", headers={"host": host}).status_code == status


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize("headers", [{"origin": EVIL}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}])
def test_change_by_a_foreign_page_is_refused(
    local: TestClient, method: str, path: str, headers: dict[str, str]
) -> None:
    assert_problem(local.request(method, path, headers=headers), 403, "origin_not_allowed")


def test_own_pages_and_programs_may_change(local: TestClient) -> None:
    submit(local)
    for headers in ({"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        assert local.post("/v1/jobs", json={"input": "x"}, headers=headers).status_code == 202


class TestCORS:
    @pytest.fixture
    def client(self, sqlite_client_of: MakeClient) -> TestClient:
        return sqlite_client_of(allowed_origins=f"{APP}, http://localhost:3000", api_key=KEY)

    def preflight(self, client: TestClient, origin: str) -> Any:
        wanted = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-a"}
        return client.options("/v1/jobs", headers={"origin": origin, **wanted})

    def test_preflight_of_an_allowed_origin_needs_no_key(self, client: TestClient) -> None:
        for origin in (APP, "http://localhost:3000"):
            response = self.preflight(client, origin)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin
            assert "POST" in response.headers["access-control-allow-methods"]
            assert response.headers["access-control-allow-headers"] == "authorization,x-a"
            assert "access-control-allow-credentials" not in response.headers
            assert response.headers["x-request-id"]

    def test_preflight_of_a_foreign_origin_allows_nothing(self, client: TestClient, local: TestClient) -> None:
        for each in (client, local):
            response = self.preflight(each, EVIL)
            assert not response.is_success
            assert "access-control-allow-origin" not in response.headers

    def test_page_of_an_allowed_origin_reads_responses(self, client: TestClient) -> None:
        headers = {"origin": APP, "sec-fetch-site": "cross-site", "authorization": f"Bearer {KEY}"}
        response = client.post("/v1/jobs", json={"input": "x"}, headers=headers)
        assert response.status_code == 202
        assert response.headers["access-control-allow-origin"] == APP
        assert "location" in response.headers["access-control-expose-headers"]
        refused = client.get("/v1/jobs", headers={"origin": APP})
        assert_problem(refused, 401, "invalid_api_key")
        assert refused.headers["access-control-allow-origin"] == APP

    def test_foreign_page_is_still_refused(self, client: TestClient) -> None:
        response = client.post("/v1/jobs", headers={"origin": EVIL, "authorization": f"Bearer {KEY}"})
        assert_problem(response, 403, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("sent", ["", "/tpo"], ids=["left out by the proxy", "sent by the proxy"])
class TestRootPath:
    def test_addresses_start_with_it(self, sqlite_client_of: MakeClient, sent: str) -> None:
        client = sqlite_client_of(root_path="/tpo")
        response = client.post(f"{sent}/v1/jobs", json={"input": "x"})
        assert response.headers["location"].startswith("/tpo/v1/jobs/job_")
        assert client.get(f"{sent}/").json()["jobs"] == "/tpo/v1/jobs"
        page = client.get(f"{sent}/docs").text
        assert "'/tpo/openapi.json'" in page
        assert 'src="/tpo/static-offline-docs' in page
        assert client.get(f"{sent}/openapi.json").json()["servers"] == [{"url": "/tpo"}]

    @pytest.mark.parametrize("path", ["/v1/jobs", "/metrics"])
    def test_key_is_checked_below_it(self, sqlite_client_of: MakeClient, sent: str, path: str) -> None:
        client = sqlite_client_of(root_path="/tpo", api_key=KEY)
        assert_problem(client.get(f"{sent}{path}"), 401, "invalid_api_key")
        assert client.get(f"{sent}{path}", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/tasks", {"host": "evil.example"}, 421),
        ("GET", "/healthcheck", {"host": "10.1.2.3"}, None),
        ("GET", "/tasks", {"host": "127.0.0.1:5555"}, None),
        ("POST", "/api/worker/shutdown/w", {"host": "localhost:5555", "origin": EVIL}, 403),
        ("POST", "/api/worker/shutdown/w", {"host": "localhost:5555", "sec-fetch-site": "cross-site"}, 403),
        ("POST", "/api/worker/shutdown/w", {"host": "localhost:5555"}, None),
    ],
)
def test_flower_refuses_foreign_pages(method: str, path: str, headers: dict[str, str], status: int | None) -> None:
    request = tornado.httputil.HTTPServerRequest(
        start_line=tornado.httputil.RequestStartLine(method, path, "HTTP/1.1"),
        headers=tornado.httputil.HTTPHeaders(headers),
        connection=Mock(),
    )
    found: Any = make_flower(Settings(broker_url="redis://127.0.0.1:1/0")).find_handler(request)
    refused = found.handler_class is ErrorHandler
    assert (found.handler_kwargs.get("status_code") if refused else None) == status
