"""Connections of the API: their number and their deadlines, without a socket."""

import asyncio
import errno
import logging
import resource
from typing import Any
from unittest.mock import Mock

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from api import connections as module
from api.connections import (
    BODY_SECONDS,
    HEADER_SECONDS,
    KEEP_ALIVE_SECONDS,
    SPARE_FILES,
    Connections,
    FewFilesError,
    GuardedProtocol,
    raise_file_limit,
)
from tpo.settings import Settings

HEAD = b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Server:
    """Connections of a server with an application that answers when a test lets it."""

    def __init__(self, limit: int = 4, **settings: Any) -> None:
        self.clock = Clock()
        configuration = Settings(_env_file=None, max_connections=1000, **settings)
        self.connections = Connections(configuration, limit + SPARE_FILES, self.clock)
        self.answer = asyncio.Event()
        self.config = Config(self._application, interface="asgi3", log_config=None)
        self.state = ServerState()

    async def _application(self, _scope: Any, _receive: Any, send: Any) -> None:
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def connect(self, address: str = "127.0.0.1") -> GuardedProtocol:
        """Open a connection from an address."""
        protocol = GuardedProtocol(self.config, self.state, {}, connections=self.connections)
        transport = Mock(asyncio.Transport)
        transport.get_extra_info.side_effect = lambda name: (address, 1) if name == "peername" else None
        transport.is_closing.return_value = False
        transport.abort.side_effect = lambda: protocol.connection_lost(OSError())
        protocol.connection_made(transport)
        return protocol

    def after(self, seconds: float) -> None:
        """Let time pass, and close what has expired."""
        self.clock.time += seconds
        self.connections.close_expired()


def is_open(protocol: GuardedProtocol) -> bool:
    return not protocol.transport.abort.called  # type: ignore[attr-defined]


class TestDeadlines:
    @pytest.mark.parametrize("sent", [b"", b"GET /", HEAD[:-2]])
    def test_headers_must_arrive(self, sent: bytes) -> None:
        async def scenario() -> None:
            server = Server()
            connection = server.connect()
            for piece in (sent[i : i + 1] for i in range(len(sent))):
                connection.data_received(piece)  # which does not extend the deadline
            server.after(HEADER_SECONDS - 1)
            assert is_open(connection)
            server.after(1)
            assert not is_open(connection)
            assert len(server.connections) == 0

        asyncio.run(scenario())

    def test_body_must_arrive(self) -> None:
        async def scenario() -> None:
            server = Server()
            slow, fast = server.connect(), server.connect()
            for each in (slow, fast):
                each.data_received(HEAD)
            for _ in range(4):
                slow.data_received(b"x")
                fast.data_received(b"x" * 25)
                server.after(BODY_SECONDS / 3)
            assert (is_open(slow), is_open(fast)) == (False, True)

        asyncio.run(scenario())

    def test_large_body_has_time_by_what_has_arrived(self) -> None:
        async def scenario() -> None:
            server = Server()
            connection = server.connect()
            connection.data_received(HEAD.replace(b"100", b"9999999"))
            for _ in range(10):
                connection.data_received(b"x" * 10 * module.BODY_BYTES_PER_SECOND)
                connection.flow.resume_reading()
                server.after(10)
                assert is_open(connection)
            server.after(BODY_SECONDS)
            assert not is_open(connection)

        asyncio.run(scenario())

    def test_server_that_reads_no_further_closes_nothing(self) -> None:
        async def scenario() -> None:
            server = Server()
            connection = server.connect()
            connection.data_received(HEAD.replace(b"100", b"9999999"))
            connection.data_received(b"x" * 100_000)
            assert connection.flow.read_paused
            server.after(1000)
            assert is_open(connection)

        asyncio.run(scenario())

    def test_served_request_has_no_deadline_and_the_next_one_has(self) -> None:
        async def scenario() -> None:
            server = Server()
            connection = server.connect()
            connection.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            server.after(1000)
            assert is_open(connection)
            server.answer.set()
            await asyncio.gather(*server.state.tasks)
            server.after(1)
            connection.data_received(b"GET / HT")
            server.after(KEEP_ALIVE_SECONDS + HEADER_SECONDS)
            assert not is_open(connection)

        asyncio.run(scenario())


class TestLimits:
    def test_oldest_waiting_connection_gives_way(self) -> None:
        async def scenario() -> None:
            server = Server(limit=3)
            served, first, second = (server.connect() for _ in range(3))
            served.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            third = server.connect()
            assert [is_open(each) for each in (served, first, second, third)] == [True, False, True, True]
            assert len(server.connections) == server.connections.limit == 3

        asyncio.run(scenario())

    def test_new_connection_is_refused_if_all_are_served(self) -> None:
        async def scenario() -> None:
            server = Server(limit=2)
            served = [server.connect() for _ in range(2)]
            for each in served:
                each.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert not is_open(server.connect())
            assert all(map(is_open, served))
            assert len(server.connections) == 2

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        ("address", "limited"),
        [("203.0.113.9", True), ("2001:db8::1", True), ("127.0.0.1", False), ("::1", False), ("10.1.2.3", False)],
    )
    def test_addresses_are_limited_except_loopback_and_proxies(self, address: str, limited: bool) -> None:
        async def scenario() -> None:
            server = Server(limit=100, max_connections_per_address=2, trusted_proxies="10.0.0.0/8, 192.0.2.1")
            other = server.connect("198.51.100.7")
            opened = [server.connect(address) for _ in range(5)]
            assert sum(map(is_open, opened)) == (2 if limited else 5)
            assert is_open(opened[-1])
            assert is_open(other)

        asyncio.run(scenario())

    def test_streams_leave_connections_to_other_requests(self) -> None:
        for limit in (16, 128, 10_000):
            connections = Server(limit=limit).connections
            assert 0 < connections.max_streams < connections.limit


class TestLog:
    def test_each_kind_is_logged_once_a_minute(self, caplog: pytest.LogCaptureFixture) -> None:
        clock = Clock()
        log = module.RateLimitedLog(clock)
        for _ in range(1000):
            log.warn("a", "first")
            log.warn("b", "second")
        clock.time += 60
        log.warn("a", "first")
        assert caplog.messages == ["first", "second", "first (999 times more since the last such line)"]

    def test_accept_errors_are_logged_once_a_minute(self, caplog: pytest.LogCaptureFixture) -> None:
        loop = Mock()
        connections = Server().connections
        for _ in range(1000):
            error = OSError(errno.EMFILE, "Too many open files")
            connections.on_loop_error(loop, {"message": "socket.accept() out of system resource", "exception": error})
        assert caplog.messages == ["connections cannot be accepted: Too many open files"]
        assert not loop.default_exception_handler.called
        connections.on_loop_error(loop, {"message": "another", "exception": OSError(errno.EIO, "x")})
        assert loop.default_exception_handler.called

    def test_warnings_of_the_server_are_limited_and_errors_are_not(self, caplog: pytest.LogCaptureFixture) -> None:
        logger = logging.getLogger("uvicorn.test")
        logger.addFilter(module.RateLimitedLog())
        for _ in range(10):
            logger.warning("Invalid HTTP request received.")
        logger.error("failed")
        logger.error("failed")
        assert caplog.messages == ["Invalid HTTP request received.", "failed", "failed"]


class TestFileLimit:
    @pytest.mark.parametrize(("soft", "hard", "expected"), [(1024, 4096, 4096), (512, 512, 512), (256, 256, 256)])
    def test_soft_limit_is_raised(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, expected: int) -> None:
        wanted: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda _which: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda _which, limits: wanted.append(limits))
        assert raise_file_limit() == expected
        assert wanted == ([(hard, hard)] if soft != hard else [])

    def test_limit_that_is_too_low_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _which: (128, 128))
        with pytest.raises(
            FewFilesError, match=r"The limit of open files is 128\. Raise it to at least 256: ulimit -n"
        ):
            raise_file_limit()
