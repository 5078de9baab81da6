"""The API ends in bounded time after SIGTERM, and its log shows the stages."""

import re
import signal
import threading
from contextlib import suppress

import httpx
import pytest

from testing.ports import free_port
from testing.processes import Process, System
from testing.waiting import HANG_SECONDS, eventually
from tests.support.worker_harness import SECRET

pytestmark = pytest.mark.processes


def request_in_background(port: int, path: str) -> None:
    def send() -> None:
        with suppress(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}{path}", timeout=HANG_SECONDS, trust_env=False)

    threading.Thread(target=send, daemon=True).start()


def hanging_api(system: System, path: str, function: str) -> Process:
    """Start an API and wait until one of its handlers hangs."""
    port = free_port()
    process = system.start("-m", "tests.support.hanging_api", port=port)
    process.wait_for("Listening on")
    request_in_background(port, path)
    if function == "_hang_loop":  # then no request is answered any more

        def is_silent() -> bool:
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=2, trust_env=False)
            except httpx.TimeoutException:
                return True
            return False

        eventually(is_silent, why="the event loop hangs")
    else:
        httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
    return process


@pytest.mark.parametrize(("path", "function"), [("/hang/thread", "_hang_thread"), ("/hang/loop", "_hang_loop")])
def test_hanging_handler_is_named_and_the_process_ends(sqlite_system: System, path: str, function: str) -> None:
    process = hanging_api(sqlite_system, path, function)
    assert process.stop(signal.SIGTERM) == 1
    assert "shutdown: signal received" in process.output
    assert "shutdown: not complete" in process.output
    assert re.search(rf"hanging_api\.py:\d+ {function}", process.output)
    assert "thread MainThread" in process.output
    assert SECRET not in process.output


def test_each_stage_of_a_shutdown_is_logged(sqlite_system: System) -> None:
    process = sqlite_system.start("-m", "api", port=free_port())
    process.wait_for("Listening on")
    assert process.stop(signal.SIGTERM) == 0
    assert "shutdown: signal received" in process.output
    stages = ("closing 0 connections", "requests ended", "database closed", "event loop closed")
    found = [process.output.index(stage) for stage in stages]
    assert found == sorted(found)
