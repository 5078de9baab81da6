"""The supervisor of `tpo up`: restarts with back-off, giving up, stopping, and logs."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tpo.cli.stack import supervisor
from tpo.cli.stack.supervisor import MAX_RESTARTS, ChildLost, Service, Supervisor

pytestmark = pytest.mark.processes

Events = list[tuple[str, dict[str, Any]]]


def _service(code: str) -> Service:
    """Return a service that runs this Python code."""
    return Service("child", (sys.executable, "-S", "-c", code), {}, stage=0)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Return the list of the events of a supervisor, whose pauses are shortened."""
    monkeypatch.setattr(supervisor, "_BACK_OFF", (0.01, 0.05))
    return []


def test_supervisor_gives_up_on_child_that_keeps_dying(tmp_path: Path, events: Events) -> None:
    with Supervisor(tmp_path, lambda event, facts: events.append((event, facts))) as running:
        running.start(_service("print('no good'); raise SystemExit(3)"))
        with pytest.raises(ChildLost, match=r"child ended 6 times in a row, last with exit code 3: no good") as lost:
            running.watch()
    assert "child.log" in str(lost.value)
    pauses = [facts["restart_in"] for event, facts in events if event == "ended"]
    assert pauses == [0.01, 0.02, 0.04, 0.05, 0.05]
    assert [event for event, _ in events].count("started") == 1 + MAX_RESTARTS


def test_supervisor_gives_up_sooner_during_startup(tmp_path: Path, events: Events) -> None:
    with Supervisor(tmp_path, lambda event, facts: events.append((event, facts))) as running:
        running.start(_service("raise SystemExit(1)"))
        with pytest.raises(ChildLost, match="ended 2 times"):
            running.wait_until(lambda: False, 60, "nothing")


def test_supervisor_names_service_that_misses_startup_timeout(tmp_path: Path, events: Events) -> None:
    with Supervisor(tmp_path, lambda event, facts: events.append((event, facts))) as running:
        running.start(_service("import time; time.sleep(60)"))
        with pytest.raises(ChildLost, match="a worker did not come up within 0 s"):
            running.wait_until(lambda: False, 0, "a worker")
    assert [event for event, _ in events] == ["started", "stopping", "stopped"]
    assert events[-1][1]["how"] == "SIGTERM"


def test_supervisor_kills_child_that_ignores_sigterm(tmp_path: Path, events: Events) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    service = Service("child", (sys.executable, "-S", "-c", code), {}, stage=0, drain_seconds=0.2)
    with Supervisor(tmp_path, lambda event, facts: events.append((event, facts))) as running:
        running.start(service)
        running.wait_until(lambda: (tmp_path / "child.log").read_text() == "up\n", 30, "the child")
    assert events[-1] == ("stopped", {"service": "child", "how": "SIGKILL"})


def test_supervisor_rotates_large_log(tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_MAX_LOG_BYTES", 9)
    (tmp_path / "child.log").write_text("very old lines")
    with Supervisor(tmp_path, lambda event, facts: events.append((event, facts))) as running:
        running.start(_service("import time; time.sleep(60)"))
    assert (tmp_path / "child.log.1").read_text() == "old lines"
    assert (tmp_path / "child.log").read_text() == ""


def test_supervisor_restores_signal_handlers(tmp_path: Path, events: Events) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    with Supervisor(tmp_path, lambda event, facts: events.append((event, facts))):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


def test_log_that_is_too_long_is_emptied_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_MAX_LOG_BYTES", 1000)
    log = tmp_path / "api.log"
    with log.open("ab", buffering=0) as child:
        for number in range(100):
            child.write(f"{number:03} ".encode() * 10)
            supervisor.rotate(log)
            assert log.stat().st_size <= 1000
            assert not (moved := tmp_path / "api.log.1").exists() or moved.stat().st_size <= 1000
        assert (tmp_path / "api.log.1").read_bytes().endswith(b"077 " * 10)
        assert log.read_bytes().startswith(b"078 ")
        assert log.read_bytes().endswith(b"099 " * 10)
        child.write(b"x" * 5000)
        supervisor.rotate(log)
    assert (tmp_path / "api.log.1").read_bytes() == b"x" * 1000
    assert log.read_bytes() == b""
