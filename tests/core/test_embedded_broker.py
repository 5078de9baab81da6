"""An embedded broker whose program does not run on this machine."""

from pathlib import Path

import pytest

from tpo.cli.checks import examine
from tpo.cli.stack import valkey
from tpo.cli.stack.run import Stack
from tpo.cli.ui.output import Failure
from tpo.settings import Settings

pytestmark = pytest.mark.processes

BROKEN = """#!/bin/sh
echo "<jemalloc>: Unsupported system page size" >&2
exit 1
"""


@pytest.fixture(params=["exits", "is missing", "cannot be executed"])
def reason(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replace the program of the broker, and return a part of the reason why it does not run."""
    program = tmp_path / "valkey-server"
    if request.param != "is missing":
        program.write_text(BROKEN)
        program.chmod(0o755 if request.param == "exits" else 0o644)
    monkeypatch.setattr(valkey, "get_binary_path", lambda: program)
    monkeypatch.delenv("TPO_BROKER_URL", raising=False)
    return {"exits": "exit code 1: <jemalloc>: Unsupported system page size", "is missing": "No such file"}.get(
        request.param, "Permission denied"
    )


def test_doctor_runs_the_broker(reason: str) -> None:
    [finding] = [finding for finding in examine() if finding.what == "broker"]
    assert finding.verdict == "fail"
    assert reason in finding.message
    assert "set TPO_BROKER_URL" in finding.message


def test_up_refuses_a_broken_broker(reason: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="set TPO_BROKER_URL") as refused:
        Stack.plan(Settings(), tmp_path / "data", broker_port=1, workers=1)
    assert reason in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_doctor_accepts_a_working_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPO_BROKER_URL", raising=False)
    [finding] = [finding for finding in examine() if finding.what == "broker"]
    assert finding.verdict == "ok"
