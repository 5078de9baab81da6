"""Bad input and faults that need a real process: raw bytes on its socket, and a broker that goes away."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from testing.processes import System, running_system
from testing.waiting import HANG_SECONDS
from tests.integration.test_api_process import Api, started_api
from tests.integration.test_events import STREAM, frames
from tests.support.api_client import assert_problem

MANY = 100_000_000


@pytest.fixture(scope="module")
def module_api(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("faults")
    shutil.copy(sqlite_template, folder / "tpo.db")
    with running_system(f"sqlite:///{folder}/tpo.db", folder) as system, started_api(system) as api:
        yield api


def raw(port: int, request: bytes) -> bytes:
    """Send these bytes and return what the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS) as connection:
        connection.sendall(request)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def header_lines(received: bytes) -> list[bytes]:
    return received.partition(b"\r\n\r\n")[0].split(b"\r\n")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/responses", "/v1/batches", "/v1/webhooks"])
def test_announced_100_mb_body_costs_no_memory(sqlite_system: System, path: str) -> None:
    with started_api(sqlite_system) as api:
        process = psutil.Process(api.process.pid)
        api.client.get("/v1/jobs")
        before = process.memory_info().rss
        assert_problem(_announce(api, path, "application/json"), 413, "body_too_large")
        assert process.memory_info().rss - before < 20_000_000


def test_upload_of_100_mb_costs_little_memory(sqlite_system: System) -> None:
    with started_api(sqlite_system, max_file_bytes=2 * MANY) as api:
        process = psutil.Process(api.process.pid)
        api.client.get("/v1/jobs")
        before = process.memory_info().rss
        highest = 0

        def parts() -> Any:
            nonlocal highest
            yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(MANY // 1_000_000):
                highest = max(highest, process.memory_info().rss)
                yield b"x" * 1_000_000
            yield b"\r\n--b--\r\n"

        response = api.client.post(
            "/v1/files", content=parts(), headers={"content-type": "multipart/form-data; boundary=b"}
        )
        assert response.status_code == 200
        assert response.json()["bytes"] == MANY
        assert max(highest, process.memory_info().rss) - before < 40_000_000


def _announce(api: Api, path: str, content_type: str) -> httpx.Response:
    """Announce a body of 100 MB, send none of it, and return the received."""
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {content_type}\r\ncontent-length: {MANY}\r\n\r\n"
    received = raw(api.port, head.encode())
    status, *headers = header_lines(received)
    assert b"connection: close" in headers
    pairs = [line.split(b": ", 1) for line in headers]
    return httpx.Response(
        int(status.split()[1]),
        headers=[(name, value) for name, value in pairs],
        content=received.partition(b"\r\n\r\n")[2],
    )


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /v1/jobs/job_x%0d%0aset-cookie:%20a=b HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n",
        b"GET /v1/jobs?after=%0d%0aset-cookie:%20a=b HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n",
        b"GET /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\nx-request-id: a\rset-cookie: a=b\r\nconnection: close\r\n\r\n",
        b"GET /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\nx-request-id: a\nset-cookie: a=b\r\nconnection: close\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\nidempotency-key: a\x00b\r\nconnection: close\r\n\r\n",
        b"GET /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\nprefer: wait=1\r\n set-cookie: a=b\r\nconnection: close\r\n\r\n",
        b"GET /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_no_header_can_be_injected_into_a_response(module_api: Api, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", module_api.port), timeout=HANG_SECONDS) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert not [line for line in header_lines(received) if line.lower().startswith(b"set-cookie")]
    assert received.count(b"HTTP/1.1 ") <= 1
    assert b" 500 " not in received.partition(b"\r\n")[0]
    assert module_api.client.get("/healthz").status_code == 200
    assert "Traceback" not in module_api.process.output


def test_file_name_is_not_copied_into_a_header(module_api: Api) -> None:
    name = "a\"; filename*=utf-8''b\r\nset-cookie: a=b"
    made = module_api.client.post("/v1/files", data={"purpose": "batch"}, files={"file": (name, b"x")})
    assert made.status_code == 200
    response = module_api.client.get(f"/v1/files/{made.json()['id']}/content")
    assert response.headers["content-disposition"] == "attachment"
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize(
    "path",
    ["/v1/responses", "/v1/chat/completions", "/v1/batches", "/v1/webhooks", "/v1/jobs/job_" + "0" * 32 + "/extend"],
)
@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"input": "\xff"}', 400, "invalid_json"),
        (b"[" * 50_000, 400, "invalid_json"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400, "invalid_json"),
        (b'{"unheard_of": NaN}', 422, "invalid_input"),
        (b"[]", 422, "invalid_input"),
        (b'{"unheard_of": 1}', 422, "invalid_input"),
    ],
)
def test_every_route_rejects_an_invalid_body(
    module_api: Api, path: str, content: bytes, status: int, code: str
) -> None:
    response = module_api.client.post(path, content=content, headers={"content-type": "application/json"})
    problem = assert_problem(response, status, code, response.json()["error"]["param"])
    if b"unheard_of" in content:
        assert "unheard_of: is not a known field" in problem["detail"]


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/jobs", "job_" + "0" * 32),
        ("/v1/files", "file-0"),
        ("/v1/batches", "batch_0"),
        ("/v1/webhooks", "wh_0"),
    ],
)
def test_page_after_the_last_item_is_empty(module_api: Api, path: str, last: str) -> None:
    empty: dict[str, Any] = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert module_api.client.get(path, params={"after": last}).json() == empty


def test_stream_continues_while_the_broker_is_down(system: System) -> None:
    system.worker(scripted_latency=0.3)
    with started_api(system) as api:
        job = api.client.post("/v1/jobs", json={"input": "Hello", "parameters": {"max_iterations": 2}}).json()
        with api.client.stream("GET", f"/v1/jobs/{job['id']}/events", headers=STREAM) as response:
            events = frames(response)
            while next(events)["event"] != "job.started":
                pass
            system.broker.stop(kill=True)
            rest = [json.loads(frame["data"]) for frame in events]
        assert rest[-1]["type"] == "job.completed"
        assert [event["sequence_number"] for event in rest] == list(
            range(rest[0]["sequence_number"], rest[-1]["sequence_number"] + 1)
        )
        assert api.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "completed"
