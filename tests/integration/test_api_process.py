"""A real `python -m api` with a real broker and both databases, while these fail."""

import asyncio
import contextlib
import signal
import socket
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai.pagination import SyncCursorPage
from openai.types import Model

from api.__main__ import _listen
from testing.ports import free_port
from testing.processes import System, marker, running_system
from testing.services import postgres_server
from testing.waiting import HANG_SECONDS, eventually
from tests.support.api_client import KEY, UNKNOWN_ID, assert_problem
from tpo.broker import queue_name
from tpo.db import schema
from tpo.settings import SCRIPTED, Settings

pytestmark = pytest.mark.processes


class Api:
    """API process that accepts connections, and a client of it."""

    def __init__(self, system: System, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = system.start("-m", "api", port=self.port, **settings)
        self.process.wait_for("Listening on")
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def submit(self, text: str = "Hello") -> httpx.Response:
        return self.client.post("/v1/jobs", json={"input": text})

    @property
    def threads(self) -> int:
        """Number of threads of the process; its first request adds one."""
        return psutil.Process(self.process.pid).num_threads()


@contextlib.contextmanager
def started_api(system: System, **settings: object) -> Iterator[Api]:
    api = Api(system, **settings)
    with api.client:
        yield api


@pytest.fixture
def api(system: System) -> Iterator[Api]:
    with started_api(system) as api:
        yield api


@pytest.fixture
def sqlite_api(sqlite_system: System) -> Iterator[Api]:
    with started_api(sqlite_system) as api:
        yield api


def test_connections_set_tcp_nodelay() -> None:
    # Without TCP_NODELAY the client's delayed acknowledgement delays each response by 40 ms.
    async def no_delay() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        configuration = Settings(port=free_port())
        async with await asyncio.start_server(accept, sock=_listen(configuration)):
            _, writer = await asyncio.open_connection(configuration.host, configuration.port)
            writer.close()
            return await accepted

    assert asyncio.run(no_delay())


class TestBroker:
    def test_job_submitted_while_it_is_down_is_notified_later(self, system: System, api: Api) -> None:
        assert api.submit().status_code == 202
        system.broker.stop(kill=True)
        response = api.submit()
        assert response.status_code == 202
        job_id = response.json()["id"]
        assert api.client.get(response.headers["location"]).json()["status"] == "queued"
        assert_problem(api.client.get("/readyz"), 503, "not_ready")
        wakeups = system.store.maintenance.sweep(renotify_seconds=0, worker_retention_seconds=60)
        assert [wakeup.model for wakeup in wakeups] == [SCRIPTED]
        assert system.store.jobs.get(job_id).status == "queued"
        system.broker.start()
        api.submit()
        eventually(
            lambda: api.client.get("/readyz").json()["checks"]["broker"] == "ok",
            why="the broker should be reachable again",
        )

    def test_hanging_broker_delays_a_response_by_seconds(self, sqlite_system: System, sqlite_api: Api) -> None:
        assert sqlite_api.submit().status_code == 202
        assert sqlite_system.broker.process
        sqlite_system.broker.process.send_signal(signal.SIGSTOP)
        try:
            # All are answered while the broker hangs: one after the other they would exceed the client's timeout.
            with ThreadPoolExecutor(32) as pool:
                responses = list(pool.map(lambda _i: sqlite_api.submit(), range(32)))
            ready = sqlite_api.client.get("/readyz")
        finally:
            sqlite_system.broker.process.send_signal(signal.SIGCONT)
        assert [r.status_code for r in responses] == [202] * 32
        assert_problem(ready, 503, "not_ready")
        assert ready.json()["checks"]["broker"] == "missing"

    def test_notifies_again_after_a_restart(self, sqlite_system: System, sqlite_api: Api) -> None:
        import redis

        sqlite_system.broker.stop()
        sqlite_api.submit()
        sqlite_system.broker.start()
        job_id = sqlite_api.submit().json()["id"]
        broker = redis.Redis(port=sqlite_system.broker.port)
        messages = b"".join(broker.lrange(queue_name("scripted"), 0, -1))  # type: ignore[arg-type]
        broker.close()
        assert job_id.encode() in messages


class TestDatabase:
    def test_stopped_postgresql_is_a_503_until_restart(self, tmp_path: Path) -> None:
        with postgres_server() as postgres:
            schema.upgrade(postgres.url)
            with running_system(postgres.url, tmp_path) as system, started_api(system) as api:
                job_id = api.submit().json()["id"]
                postgres.stop()
                for _ in range(2):
                    assert_problem(api.submit(), 503, "database_unavailable")
                    assert_problem(api.client.get("/v1/jobs"), 503, "database_unavailable")
                    assert_problem(api.client.post(f"/v1/jobs/{job_id}/cancel"), 503, "database_unavailable")
                assert api.client.get("/healthz").status_code == 200
                assert api.client.get("/readyz").json()["checks"]["database"] == "missing"
                with started_api(system) as second:
                    assert_problem(second.submit(), 503, "database_unavailable")
                    postgres.start()
                    assert second.submit().status_code == 202
                assert len(api.client.get("/v1/jobs").json()["data"]) == 2

    def test_missing_or_damaged_sqlite_file_is_a_503(
        self, sqlite_system: System, sqlite_api: Api, tmp_path: Path
    ) -> None:
        job_id = sqlite_api.submit().json()["id"]
        moved = tmp_path / "moved"
        moved.mkdir()
        for file in tmp_path.glob("tpo.db*"):
            file.rename(moved / file.name)
        (tmp_path / "tpo.db").mkdir()
        assert_problem(sqlite_api.submit(), 503, "database_unavailable")
        (tmp_path / "tpo.db").rmdir()
        (tmp_path / "tpo.db").write_bytes(b"no database " * 1000)
        assert "no SQLite database" in assert_problem(sqlite_api.submit(), 503, "database_unavailable")["detail"]
        (tmp_path / "tpo.db").unlink()
        for file in moved.iterdir():
            file.rename(tmp_path / file.name)
        assert [job["id"] for job in sqlite_api.client.get("/v1/jobs").json()["data"]] == [job_id]

    def test_start_without_the_schema_fails(self, database_url: str, tmp_path: Path) -> None:
        with running_system(database_url, tmp_path) as system:
            process = system.start("-m", "api", port=free_port())
            assert process.popen.wait(timeout=HANG_SECONDS) == 1
            assert "tpo db upgrade" in process.output
            assert "Traceback" not in process.output


class TestProcess:
    def test_start_on_a_used_port_fails_with_the_reason(self, sqlite_system: System) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            process = sqlite_system.start("-m", "api", port=port)
            assert process.popen.wait(timeout=HANG_SECONDS) == 1
        assert f"port {port}" in process.output
        assert "TPO_PORT" in process.output
        assert "Traceback" not in process.output

    def test_start_without_a_key_warns_or_fails(self, sqlite_system: System, sqlite_api: Api) -> None:
        sqlite_api.process.wait_for("No TPO_API_KEY: listening on this machine only")
        open_to_others = sqlite_system.start("-m", "api", port=free_port(), host="0.0.0.0")
        assert open_to_others.popen.wait(timeout=HANG_SECONDS) == 1
        assert "TPO_API_KEY" in open_to_others.output

    def test_start_names_an_invalid_setting_without_its_value(self, sqlite_system: System) -> None:
        process = sqlite_system.start("-m", "api", port=free_port(), api_key="too-short-key")
        assert process.popen.wait(timeout=HANG_SECONDS) == 1
        assert "TPO_API_KEY" in process.output
        assert "too-short-key" not in process.output

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal_ends_the_process_cleanly(self, sqlite_api: Api, number: int) -> None:
        assert sqlite_api.client.get("/healthz").status_code == 200  # the connection stays open
        # The forced exit after the deadline would have code 1.
        assert sqlite_api.process.stop(number) == 0

    def test_signal_lets_a_running_request_finish(self, sqlite_system: System, sqlite_api: Api, tmp_path: Path) -> None:
        # A writer holds SQLite's lock until after the signal. The submit that waits for it must still be answered.
        writer = sqlite3.connect(tmp_path / "tpo.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        with ThreadPoolExecutor(1) as pool:
            threads = sqlite_api.threads
            pending = pool.submit(sqlite_api.submit)
            eventually(lambda: sqlite_api.threads > threads, why="the request should be running")
            sqlite_api.process.popen.send_signal(signal.SIGTERM)
            writer.execute("ROLLBACK")
            writer.close()
            response = pending.result()
        assert response.status_code == 202
        assert sqlite_api.process.popen.wait(timeout=HANG_SECONDS) == 0
        assert sqlite_system.store.jobs.get(response.json()["id"]).status == "queued"

    def test_signal_ends_the_process_while_the_database_hangs(self, tmp_path: Path) -> None:
        with postgres_server() as postgres:
            schema.upgrade(postgres.url)
            with (
                running_system(postgres.url, tmp_path) as system,
                started_api(system) as api,
                postgres.suspended(),
                ThreadPoolExecutor(1) as pool,
            ):
                threads = api.threads
                hangs = pool.submit(api.submit)
                eventually(lambda: api.threads > threads, why="the request should be running")
                assert httpx.get(f"{api.url}/healthz").status_code == 200
                api.process.stop()
                assert_problem(hangs.result(), 503, "server_stopping")
                assert "Traceback" not in api.process.output

    def test_logs_no_text_and_no_query(self, system: System, api: Api) -> None:
        secret = marker()
        api.submit(secret)
        api.client.post("/v1/jobs", json={"input": secret, secret: secret})
        api.client.get(f"/v1/jobs?after={secret}")
        api.client.post("/v1/jobs", content=secret + '{"')
        system.broker.stop(kill=True)
        job_id = api.submit(secret).json()["id"]
        api.client.get(f"/v1/jobs/{job_id}%0aforged", headers={"x-request-id": "in-the-log"})
        api.process.wait_for("in-the-log")
        assert secret not in api.process.output
        assert "\nforged" not in api.process.output
        assert f"will notify the workers of {job_id}" in api.process.output

    def test_endless_body_is_cut_off(self, sqlite_api: Api) -> None:
        sent = 0
        with socket.create_connection(("127.0.0.1", sqlite_api.port)) as connection:
            connection.sendall(
                b"POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            with contextlib.suppress(ConnectionError):
                while sent < 200_000_000:
                    connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                    sent += 65536
        assert sent < 100_000_000
        assert "POST /v1/jobs 413" in sqlite_api.process.output


class TestOpenAIClient:
    @pytest.fixture
    def client(self, sqlite_system: System) -> Iterator[openai.OpenAI]:
        with (
            started_api(sqlite_system, api_key=KEY) as api,
            openai.OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0) as client,
        ):
            yield client

    def test_keeps_code_param_and_body(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.post("/jobs", body={"input": "x", "model": "nobody"}, cast_to=object)
        error = caught.value
        assert (error.code, error.param, error.type) == ("unknown_model", "model", "invalid_request_error")
        assert isinstance(error.body, dict)
        assert error.body["message"]
        assert error.request_id
        assert error.response.json()["status"] == 422

    def test_raises_the_exception_of_each_status(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            client.get(f"/jobs/{UNKNOWN_ID}", cast_to=object)
        assert missing.value.code == "job_not_found"
        with pytest.raises(openai.BadRequestError):
            client.post(
                "/jobs", content=b"{", options={"headers": {"content-type": "application/json"}}, cast_to=object
            )
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").get("/jobs", cast_to=object)

    def test_submits_and_paginates_by_last_id(self, client: openai.OpenAI) -> None:
        submitted = [_post(client, {"input": f"job {i}"})["id"] for i in range(5)]
        pages = client.get_api_list("/jobs", page=SyncCursorPage[Model], model=Model, options={"params": {"limit": 2}})
        assert sorted(job.id for job in pages) == sorted(submitted)

    def test_lists_models(self, client: openai.OpenAI, sqlite_system: System) -> None:
        sqlite_system.store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
        assert [model.id for model in client.models.list()] == ["scripted"]


def _post(client: openai.OpenAI, body: dict[str, Any]) -> dict[str, Any]:
    job: Any = client.post("/jobs", body=body, cast_to=object)
    assert isinstance(job, dict)
    return job
