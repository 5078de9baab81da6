"""Flower with a real worker: a live view that requires a password."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from testing.services import valkey_server
from testing.waiting import HANG_SECONDS, eventually
from tests.support.stack import Up, running_up, tpo

pytestmark = pytest.mark.processes

BROKER_PASSWORD = "broker-pass-5521"
AUTH = ("ops", "flower-pass-8842")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Start `tpo up` on a broker with a password, and complete one job."""
    folder = tmp_path_factory.mktemp("flower")
    with valkey_server(folder / "valkey") as valkey:
        _set_password(valkey.port)
        broker = f"redis://:{BROKER_PASSWORD}@127.0.0.1:{valkey.port}/0"
        with running_up(
            folder / "data", TPO_BROKER_URL=broker, TPO_FLOWER_BASIC_AUTH=":".join(AUTH), TPO_FLOWER_HOST="127.0.0.1"
        ) as running:
            _wait_for_workers(running)
            done = tpo("submit", "--wait", "Where is my order?", env=running.env)
            assert done.returncode == 0, done.stderr
            yield running
            assert running.stop()[0] == 0


def test_flower_shows_named_workers_and_tasks(up: Up) -> None:
    (task,) = _run_job_tasks(up)
    assert task["state"] == "SUCCESS"
    assert task["runtime"] > 0
    assert re.fullmatch(r"\[?\(?['\"]job_[0-9a-f]{32}['\"],?\)?\]?", task["args"])
    assert task["kwargs"] == "{}"
    names = " ".join(_get(up, "/api/workers").json())
    assert "tpo-worker-" in names
    assert "tpo-maintenance-" in names


@pytest.mark.parametrize("page", ["/", "/tasks", "/broker", "/metrics", "/api/tasks", "/api/workers"])
def test_flower_requires_the_password(up: Up, page: str) -> None:
    for auth in (None, ("ops", "wrong-password"), ("", "")):
        response = httpx.get(up.facts["flower"] + page, auth=auth)
        assert response.status_code == 401
        assert "tpo" not in response.text


def test_flower_healthcheck_is_public(up: Up) -> None:
    response = httpx.get(up.facts["flower"] + "/healthcheck")
    assert (response.status_code, response.text) == (200, "OK")


@pytest.mark.parametrize("path", ["/api/task/send-task/tpo.run_job", "/api/worker/shutdown/{worker}"])
def test_flower_is_read_only(up: Up, path: str) -> None:
    worker = next(name for name in _get(up, "/api/workers").json() if "tpo-worker-" in name)
    response = httpx.post(
        up.facts["flower"] + path.format(worker=worker), auth=AUTH, content=json.dumps({"args": ["job_x"]})
    )
    assert response.status_code == 403
    assert httpx.get(f"{up.facts['api']}/readyz").status_code == 200


def test_flower_listens_only_on_loopback(up: Up) -> None:
    port = up.ports["flower-port"]
    table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    listening = re.findall(rf"([0-9A-F]+):{port:04X} [0-9A-F]+:0000 0A", table)
    assert listening == ["0100007F"]


def _get(up: Up, page: str) -> httpx.Response:
    response = httpx.get(up.facts["flower"] + page, auth=AUTH, timeout=HANG_SECONDS)
    assert response.status_code == 200, page
    return response


def _run_job_tasks(up: Up) -> list[dict[str, Any]]:
    def finished() -> list[dict[str, Any]] | None:
        tasks = [t for t in _get(up, "/api/tasks").json().values() if t["name"] == "tpo.run_job"]
        return tasks if all(t["state"] == "SUCCESS" for t in tasks) else None

    return eventually(finished, why="Flower should see the end of the job's task")


def _wait_for_workers(up: Up) -> None:
    """Wait for Flower to see the workers: it shows only events that follow."""
    eventually(lambda: len(_get(up, "/api/workers?refresh=true").json()) >= 2, why="Flower should see the workers")


def _set_password(port: int) -> None:
    with redis.Redis(port=port) as client:
        client.config_set("requirepass", BROKER_PASSWORD)
