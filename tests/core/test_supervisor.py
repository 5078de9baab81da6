"""Children that die: restarted with back-off, until it is enough."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tpo.cli.stack import supervisor
from tpo.cli.stack.supervisor import MAX_RESTARTS, ChildLost, Service, Supervisor

pytestmark = pytest.mark.processes

Told = list[tuple[str, dict[str, Any]]]


def _service(code: str) -> Service:
    return Service("child", (sys.executable, "-S", "-c", code), {}, stage=0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What a supervisor tells; its pauses are short."""
    monkeypatch.setattr(supervisor, "_BACK_OFF", (0.01, 0.05))
    return []


def test_supervisor_gives_up_on_child_that_keeps_dying(tmp_path: Path, told: Told) -> None:
    with Supervisor(tmp_path, lambda event, facts: told.append((event, facts))) as running:
        running.start(_service("print('no good'); raise SystemExit(3)"))
        with pytest.raises(ChildLost, match=r"child ended 6 times in a row, last with exit code 3: no good") as lost:
            running.watch()
    assert "child.log" in str(lost.value)
    pauses = [facts["restart_in"] for event, facts in told if event == "ended"]
    assert pauses == [0.01, 0.02, 0.04, 0.05, 0.05]
    assert [event for event, _ in told].count("started") == 1 + MAX_RESTARTS


def test_supervisor_gives_up_sooner_during_startup(tmp_path: Path, told: Told) -> None:
    with Supervisor(tmp_path, lambda event, facts: told.append((event, facts))) as running:
        running.start(_service("raise SystemExit(1)"))
        with pytest.raises(ChildLost, match="ended 2 times"):
            running.wait_until(lambda: False, 60, "nothing")


def test_supervisor_names_service_that_misses_startup_timeout(tmp_path: Path, told: Told) -> None:
    with Supervisor(tmp_path, lambda event, facts: told.append((event, facts))) as running:
        running.start(_service("import time; time.sleep(60)"))
        with pytest.raises(ChildLost, match="a worker did not come up within 0 s"):
            running.wait_until(lambda: False, 0, "a worker")
    assert [event for event, _ in told] == ["started", "stopping", "stopped"]
    assert told[-1][1]["how"] == "SIGTERM"


def test_supervisor_kills_child_that_ignores_sigterm(tmp_path: Path, told: Told) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    service = Service("child", (sys.executable, "-S", "-c", code), {}, stage=0, drain_seconds=0.2)
    with Supervisor(tmp_path, lambda event, facts: told.append((event, facts))) as running:
        running.start(service)
        running.wait_until(lambda: (tmp_path / "child.log").read_text() == "up\n", 30, "the child")
    assert told[-1] == ("stopped", {"service": "child", "how": "SIGKILL"})


def test_supervisor_rotates_large_log(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_MAX_LOG_BYTES", 3)
    (tmp_path / "child.log").write_text("old lines")
    with Supervisor(tmp_path, lambda event, facts: told.append((event, facts))) as running:
        running.start(_service("import time; time.sleep(60)"))
    assert (tmp_path / "child.log.1").read_text() == "old lines"
    assert (tmp_path / "child.log").read_text() == ""


def test_supervisor_restores_signal_handlers(tmp_path: Path, told: Told) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    with Supervisor(tmp_path, lambda event, facts: told.append((event, facts))):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before
