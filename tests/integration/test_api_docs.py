"""The commands of docs/api.md run and have the documented results."""

import json
import re
import subprocess
from pathlib import Path

from testing.ports import free_port
from testing.processes import System
from testing.waiting import HANG_SECONDS
from tests.support.error_codes import codes
from tpo.core.errors import BackendUnavailableError, JobError

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_command_works(sqlite_system: System) -> None:
    sqlite_system.store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
    port = free_port()
    sqlite_system.start("-m", "api", port=port, lease_seconds=600, renotify_seconds=600).wait_for("Listening on")
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
    script = commands.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("curl ", "curl --fail-with-body -w '\\n' ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    responses = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(responses) == commands.count("curl ") - 1  # one response goes into $JOB
    submitted, limited, first, again, polled = responses[:5]
    assert limited["parameters"]["early_stop"] == {"patience": 2, "min_gain": 0.1}
    assert first["id"] == again["id"] != submitted["id"]
    assert (polled["status"], polled["metadata"]) == ("queued", {"ticket": "4711"})
    statuses = [
        response["status"] for response in responses if response.get("id") == polled["id"] and "status" in response
    ]
    assert statuses == ["queued", "queued", "paused", "queued", "cancelled"]
    assert {"id": polled["id"], "object": "job", "deleted": True} in responses


def test_every_code_is_listed() -> None:
    listed = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| \d{3} \|.*$", PAGE.read_text(), re.MULTILINE))))
    assert listed - {"param"} == codes()


def test_every_code_of_a_failed_job_is_listed() -> None:
    _, _, table = PAGE.read_text().partition("| a failed job's `error.code` |")
    listed = set(re.findall(r"`([a-z_]+)`", table.partition("\n\n")[0])) - {"retry"}
    classes: list[type[JobError] | type[BackendUnavailableError]] = [
        *JobError.__subclasses__(),
        BackendUnavailableError,
    ]
    codes_of_classes = {error.code for error in classes}
    assert listed == codes_of_classes | {"worker_lost", "unreadable_record", "internal_error", "out_of_memory"}
