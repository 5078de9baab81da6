"""`tpo up` with real processes, some of which are killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from testing.ports import free_port
from testing.services import new_database, valkey_server
from testing.waiting import HANG_SECONDS, eventually
from tests.support.stack import Up, all_gone, environment, running_up, tpo, tpo_up
from tpo.cli.stack.run import Stack
from tpo.settings import Settings

pytestmark = pytest.mark.processes

SERVICES = {"broker", "api", "flower", "maintenance", "worker"}


def _submit(up: Up, prompt: str = "Where is my order?") -> str:
    done = tpo("submit", "--wait", prompt, env=up.env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"api_key": "key-of-16-characters"}, "TPO_API_KEY"),
        ({"require_key": True, "host": "0.0.0.0"}, "with a key that"),
        ({}, "this machine only"),
    ],
)
def test_up_prints_who_may_use_the_api(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    stack = Stack.plan(Settings(**settings), tmp_path, broker_port=6479, workers=1)
    assert text in stack.guard


def test_interrupt_stops_the_worker_first_and_the_broker_last(tmp_path: Path) -> None:
    with running_up(tmp_path / "data") as up:
        assert set(up.pids) == SERVICES
        assert up.facts["api"] == f"http://127.0.0.1:{up.ports['port']}"
        docs = httpx.get(up.facts["docs"])
        assert docs.status_code == 200
        assert "://" not in docs.text  # no link to another server: the page works without a network
        assert httpx.get(up.facts["flower"]).status_code == 200
        answer = _submit(up)
        family = up.family()
        code, events = up.stop(signal.SIGINT)
    assert code == 0
    assert all_gone(family)
    stopped = [fact for fact in events if fact["event"] == "stopped"]
    assert [stopped[0]["service"], stopped[-1]["service"]] == ["worker", "broker"]
    assert {fact["how"] for fact in stopped} == {"exit code 0"}
    # The job is still stored after a restart.
    with running_up(tmp_path / "data") as up:
        (job,) = httpx.get(f"{up.facts['api']}/v1/jobs?include=output").json()["data"]
        assert job["output"].strip() == answer.strip()
        code, _ = up.stop(signal.SIGTERM)
    assert code == 0


@pytest.mark.slow
def test_killed_children_are_restarted(tmp_path: Path) -> None:
    with running_up(tmp_path / "data", TPO_LEASE_SECONDS="3", TPO_SWEEP_SECONDS="0.5") as up:
        before = dict(up.pids)
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        started: set[str] = set()
        for fact in up.events():
            if fact["event"] == "started":
                started.add(fact["service"])
            if started == SERVICES:
                break
        assert not set(before.values()) & set(up.pids.values())
        _wait_ready(up)
        assert "Draft" in _submit(up)


def test_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    with running_up(tmp_path / "data", "--workers", "2") as up:
        family = up.family()
        assert len(family) == 1 + len(SERVICES) + 1
        up.process.kill()
        assert all_gone(family)


def test_second_interrupt_kills_hanging_processes(tmp_path: Path) -> None:
    with running_up(tmp_path / "data") as up:
        family = up.family()
        os.kill(up.pids["worker"], signal.SIGSTOP)
        up.process.send_signal(signal.SIGINT)
        assert up.wait_for("stopping")["service"] == "worker"
        code, _ = up.stop(signal.SIGINT)
    assert code == 130
    assert all_gone(family)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70, "300.1.1.1"])
def test_invalid_host_is_a_one_line_error(tmp_path: Path, host: str) -> None:
    env = environment(TPO_API_KEY="a-key-of-this-test")
    done = tpo_up(tmp_path / "data", "--host", host, env=env)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert host in done.stderr


def test_used_port_is_reported_before_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for option in ("--port", "--flower-port", "--broker-port"):
            others = [w for o in ("--port", "--flower-port", "--broker-port") if o != option for w in (o, _port())]
            done = tpo("up", "--data-dir", str(tmp_path / "data"), option, port, *others)
            assert done.returncode == 1
            assert f"port {port}" in done.stderr
            assert option in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "data" / "tpo.db").exists()


def test_missing_broker_is_reported_before_the_start(tmp_path: Path) -> None:
    env = environment(TPO_BROKER_URL=f"redis://:secret-word@127.0.0.1:{free_port()}/0")
    done = tpo_up(tmp_path, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tpo: The broker cannot be reached. Is TPO_BROKER_URL right, and does the server run?\n"
    assert not (tmp_path / "tpo.db").exists()


def test_unwritable_log_is_a_one_line_error(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "api.log"
    log.mkdir(parents=True)  # cannot be written, even by root
    ports = [word for name in ("port", "flower-port", "broker-port") for word in (f"--{name}", _port())]
    done = tpo("up", "--json", "--data-dir", str(tmp_path), *ports)
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"]["message"] == f"cannot continue: {log}: Is a directory"
    (started,) = [fact["pid"] for fact in map(json.loads, done.stdout.splitlines()) if fact["event"] == "started"]
    assert not psutil.pid_exists(started)


def test_equal_ports_are_rejected(tmp_path: Path) -> None:
    done = tpo_up(tmp_path, "--port", "45001", "--flower-port", "45001")
    assert done.returncode == 1
    assert "cannot both have port 45001" in done.stderr


def test_second_up_on_the_same_folder_is_rejected(tmp_path: Path) -> None:
    with running_up(tmp_path / "data") as up:
        done = tpo_up(tmp_path / "data")
        assert done.returncode == 1
        assert f"already runs on {tmp_path / 'data'}" in done.stderr
        assert f"process {up.process.pid}" in done.stderr
        assert up.process.poll() is None


@pytest.mark.slow
def test_missing_model_ends_up_with_the_reason(tmp_path: Path) -> None:
    ports = {"port": free_port(), "flower-port": free_port(), "broker-port": free_port()}
    up = Up(tmp_path / "data", ports, environment(TPO_POLICY=str(tmp_path / "no-such-model")))
    with up.process:
        events = list(up.events())
        family = set(up.pids.values())
        assert up.process.wait(HANG_SECONDS) == 1
        assert "no-such-model" in up.errors()
    assert [fact["event"] for fact in events].count("ended") == 1
    assert not any(psutil.pid_exists(pid) for pid in family)


def test_configured_servers_are_used(tmp_path: Path, postgres_admin_url: str) -> None:
    with (
        valkey_server(tmp_path / "valkey") as valkey,
        new_database(postgres_admin_url) as database,
        running_up(tmp_path / "data", TPO_BROKER_URL=valkey.url, TPO_DATABASE_URL=database) as up,
    ):
        assert set(up.pids) == SERVICES - {"broker"}
        assert "Draft" in _submit(up)
        assert not (tmp_path / "data" / "tpo.db").exists()


def test_public_address_without_a_key_is_rejected(tmp_path: Path) -> None:
    done = tpo_up(tmp_path, "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "TPO_API_KEY" in done.stderr


def test_process_list_contains_no_secret(tmp_path: Path) -> None:
    secrets = {"TPO_API_KEY": "key-0123456789abcdef", "TPO_FLOWER_BASIC_AUTH": "ops:flower-secret-1"}
    with running_up(tmp_path / "data", **secrets) as up:
        shown = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(up.ports["broker-port"]) in shown
        configuration = tmp_path / "data/broker/valkey.conf"
        password = configuration.read_text().removeprefix("requirepass ").strip()
        assert len(password) >= 32
        assert not [secret for secret in ("key-0123456789abcdef", "flower-secret-1", password) if secret in shown]
        assert configuration.stat().st_mode & 0o777 == 0o600
        with redis.Redis(port=up.ports["broker-port"]) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        _submit(up)
        assert up.stop()[0] == 0
        logs = "".join(log.read_text() for log in (tmp_path / "data/logs").iterdir())
        assert password not in logs + json.dumps(up.facts)


def _port() -> str:
    return str(free_port())


def _wait_ready(up: Up) -> None:
    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{up.env['TPO_URL']}/readyz", timeout=10).status_code == 200
        return False

    eventually(ready, why="the API should be ready again")
