"""A flood of connections that never finish their request, against an API that may open few files."""

import contextlib
import socket
from collections.abc import Iterator

import httpx
import psutil
import pytest

from api.connections import SPARE_FILES
from testing.ports import free_port
from testing.processes import Process, System
from testing.waiting import HANG_SECONDS, eventually

pytestmark = pytest.mark.processes

FILES = 320
FLOOD = 500
HOST = b"Host: 127.0.0.1\r\n"
HALF_OPEN = [
    b"",
    b"GET / HTTP/1.1\r\n" + HOST + b"X-A: ",
    b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n",
]
PROGRAM = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}));"
    "from api.__main__ import main; sys.exit(main())"
)


def started(system: System, port: int, files: int = FILES) -> Process:
    """Start an API with this limit of open files."""
    return system.start("-c", PROGRAM.format(files=files), port=port)


@contextlib.contextmanager
def half_open(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Open connections that send a part of a request, or nothing."""
    with contextlib.ExitStack() as stack:
        connections = []
        for number in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS))
            with contextlib.suppress(OSError):  # it may be closed already
                connection.sendall(HALF_OPEN[number % len(HALF_OPEN)])
            connections.append(connection)
        yield connections


def test_half_open_connections_do_not_stop_the_server(sqlite_system: System) -> None:
    port = free_port()
    api = started(sqlite_system, port)
    api.wait_for("Listening on")
    process = psutil.Process(api.pid)
    for _ in range(3):
        with half_open(port, FLOOD):
            for _ in range(5):
                assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=HANG_SECONDS).status_code == 200
            response = httpx.post(f"http://127.0.0.1:{port}/v1/jobs", json={"input": "x"}, timeout=HANG_SECONDS)
            assert response.status_code == 202
            eventually(lambda: len(_accepted(process, port)) <= FILES - SPARE_FILES, why="the limit should hold")
            assert process.num_fds() < FILES
    lines = api.output.splitlines()
    requests = [line for line in lines if " api.access " in line]
    assert len(requests) <= 3 * (FLOOD // len(HALF_OPEN) + 6)  # a line for each request whose headers arrived
    assert len("".join(requests)) < 120 * len(requests)
    assert len(lines) - len(requests) <= 5
    assert api.output.count("connections are open") == 1


def test_streams_leave_connections_to_probes(sqlite_system: System) -> None:
    port = free_port()
    started(sqlite_system, port).wait_for("Listening on")
    base = f"http://127.0.0.1:{port}"
    job_id = httpx.post(f"{base}/v1/jobs", json={"input": "x"}).json()["id"]
    request = f"GET /v1/jobs/{job_id}/events?stream=true HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        statuses = []
        for _ in range(FILES - SPARE_FILES):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS))
            connection.sendall(request)
            statuses.append(connection.recv(12)[9:])
        assert set(statuses) == {b"200", b"503"}
        assert statuses.count(b"200") == (FILES - SPARE_FILES) - (FILES - SPARE_FILES) // 8
        for path in ("/healthz", "/v1/jobs"):
            assert httpx.get(base + path, timeout=HANG_SECONDS).status_code == 200


def test_too_low_file_limit_is_one_clear_line(sqlite_system: System) -> None:
    api = started(sqlite_system, free_port(), files=100)
    assert api.popen.wait(timeout=HANG_SECONDS) == 1
    assert api.output == (
        "The API cannot start: The limit of open files is 100. Raise it to at least 256: ulimit -n 1024\n"
    )


def _accepted(process: psutil.Process, port: int) -> list[int]:
    connections = process.net_connections("tcp")
    return [each.fd for each in connections if each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED]
