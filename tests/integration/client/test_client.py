"""The Python client against a real server and worker: cut connections, retries, idempotency and batches."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from testing.ports import free_port
from testing.processes import System, running_system
from testing.waiting import eventually
from tests.integration.test_api_process import Api, started_api
from tests.support.cutting import Cutter, cutter
from tpo.client import (
    TERMINAL,
    APIConnectionError,
    AuthenticationError,
    BadRequestError,
    Client,
    ClientError,
    ConflictError,
    InternalServerError,
    Job,
    JobFailedError,
    NotFoundError,
    RateLimitError,
    WaitTimeoutError,
)

KEY = "a-key-that-is-long-enough"
SMALL: dict[str, Any] = {"parameters": {"sample_size": 2, "max_iterations": 1}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[tuple[System, Api]]:
    """Server and worker for all tests of this file."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "tpo.db").write_bytes(sqlite_template.read_bytes())
    with running_system(f"sqlite:///{folder}/tpo.db", folder) as system, started_api(system) as api:
        system.worker(scripted_latency=0.02, concurrency=8)
        yield system, api


@pytest.fixture
def system(served: tuple[System, Api]) -> System:
    return served[0]


@pytest.fixture
def proxy(served: tuple[System, Api]) -> Iterator[Cutter]:
    with cutter(served[1].port) as proxy:
        yield proxy


@pytest.fixture
def client(served: tuple[System, Api]) -> Iterator[Client]:
    with Client(served[1].url) as client:
        yield client


def jobs_in(system: System) -> int:
    with system.engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM jobs")).scalar_one())


def test_submit_wait_and_read_the_record(client: Client) -> None:
    seen: list[Job] = []
    job = client.submit("Where is it?", metadata={"row": "1"}, parameters={"sample_size": 2, "max_iterations": 8})
    assert job["metadata"] == {"row": "1"}
    ended = client.wait(job, progress=seen.append)
    assert ended["status"] == "completed"
    assert ended["output"]
    assert seen[-1] == ended
    assert len(seen) > 2  # progress was reported before the end
    assert client.get(job["id"]) == ended == client.cancel(job)
    assert [i["number"] for i in client.iterations(job)] == list(range(9))
    assert len(client.candidates(job)) == 18


def test_events_are_streamed_and_resumable(client: Client) -> None:
    job = client.submit("Hello", **SMALL)
    events = list(client.events(job))
    assert [e["sequence_number"] for e in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "job.completed"
    assert list(client.events(job, starting_after=3)) == events[3:]
    assert list(client.events(job, starting_after=len(events))) == list(client.events(job, starting_after=9999)) == []


def test_cut_event_stream_is_resumed(client: Client, proxy: Cutter) -> None:
    job = client.submit("Hello", **SMALL)
    proxy.budgets = [100, 300, 500, 700, 900, 1100]
    with Client(proxy.url) as cut:
        events = list(cut.events(job))
    assert proxy.connections >= 5
    assert events == list(client.events(job))


def test_submit_with_a_lost_response_creates_one_job(system: System, proxy: Cutter) -> None:
    before = jobs_in(system)
    proxy.lost = 2
    with Client(proxy.url) as client:
        job = client.submit("Hello", **SMALL)
    assert proxy.connections == 3
    assert system.store.jobs.get(job["id"]).id == job["id"]
    assert jobs_in(system) == before + 1


def test_idempotency_key_holds_over_calls_and_clients(system: System, client: Client) -> None:
    before = jobs_in(system)
    with ThreadPoolExecutor(8) as pool:
        job_ids = list(pool.map(lambda _: client.submit("Hello", idempotency_key="one", **SMALL)["id"], range(20)))
    assert len(set(job_ids)) == 1
    assert jobs_in(system) == before + 1
    with pytest.raises(BadRequestError) as rejected:
        client.submit("Other", idempotency_key="one", **SMALL)
    assert rejected.value.code == "idempotency_key_reused"
    assert client.submit("Hello", **SMALL)["id"] != client.submit("Hello", **SMALL)["id"]


def test_temporary_error_is_retried_after_retry_after(system: System, proxy: Cutter) -> None:
    before = jobs_in(system)
    proxy.refusals = 2
    began = time.monotonic()
    with Client(proxy.url) as client:
        client.submit("Hello", **SMALL)
    assert time.monotonic() - began > 2
    assert proxy.connections == 3
    assert jobs_in(system) == before + 1


def test_persistent_error_raises_its_class(proxy: Cutter) -> None:
    proxy.refusals = 1
    with Client(proxy.url, retries=0) as client:
        with pytest.raises(InternalServerError) as failed:
            client.get("job_1")
        assert (failed.value.status, failed.value.retry_after) == (503, 1.0)
        proxy.refusals = 1
        proxy.refusal = b"HTTP/1.1 429 Too Many\r\nconnection: close\r\nretry-after: 9999\r\ncontent-length: 0\r\n\r\n"
        with pytest.raises(RateLimitError):
            client.get("job_1")
    proxy.refusals = 1
    with Client(proxy.url) as patient, pytest.raises(RateLimitError):
        patient.get("job_1")  # a retry-after of hours is not waited for


def test_errors_are_typed(client: Client) -> None:
    unknown = "job_" + "0" * 32
    for ask in (client.get, client.wait, client.cancel, client.iterations, lambda i: list(client.events(i))):
        with pytest.raises(NotFoundError) as missing:
            ask(unknown)
        assert (missing.value.status, missing.value.code) == (404, "job_not_found")
        assert missing.value.request_id
    with pytest.raises(BadRequestError, match=r"parameters\.sample_size") as invalid:
        client.submit("x", parameters={"sample_size": 0})
    assert invalid.value.param == "parameters.sample_size"
    client.submit("x", external_id="mine", **SMALL)
    with pytest.raises(ConflictError):
        client.submit("y", external_id="mine", **SMALL)
    with Client(f"http://127.0.0.1:{free_port()}", retries=1) as nobody, pytest.raises(APIConnectionError):
        nobody.get(unknown)
    with pytest.raises(ClientError, match="not an address"), Client("nonsense") as nonsense:
        nonsense.get(unknown)


def test_unencodable_value_error_names_the_field(client: Client) -> None:
    for job, field in (
        ({"input": "half a pair \ud83d"}, "input"),
        ({"input": "x", "parameters": {"temperature": float("nan")}}, "parameters.temperature"),
        ({"input": "x", "deadline_seconds": float("inf")}, "deadline_seconds"),
    ):
        with pytest.raises(BadRequestError) as invalid:
            client.submit(job)
        assert invalid.value.param == field
    whole = client.submit("a pair \U0001f600, ü, 漢字", **SMALL)
    assert whole["input"] == "a pair \U0001f600, ü, 漢字"
    with pytest.raises(NotFoundError):
        client.get("job_\udcff")
    with pytest.raises(ClientError, match="cannot be sent"):
        client.submit("x", idempotency_key="ü")
    with pytest.raises(ClientError, match="cannot be sent"):
        next(client.list(metadata={"a": "\udcff"}))


@pytest.mark.parametrize("key", ["two\nlines-of-a-file", "schlüssel-der-lang-genug-ist"])
def test_invalid_api_key_is_not_quoted(key: str) -> None:
    with pytest.raises(ClientError, match="API key") as error:
        Client(api_key=key)
    assert key not in str(error.value)


def test_api_key_authenticates(system: System) -> None:
    with started_api(system, api_key=KEY) as api:
        with Client(api.url, "another-key-that-is-wrong") as stranger, pytest.raises(AuthenticationError):
            next(stranger.list())
        with Client(api.url, KEY) as known:
            assert known.get(known.submit("x", **SMALL)["id"])["status"] in {"queued", "in_progress", "completed"}


def test_wait_times_out(client: Client) -> None:
    job = client.submit("x", model=None, parameters={"sample_size": 2, "max_iterations": 50})
    client.pause(job)  # so that it cannot end early on a slow machine
    with pytest.raises(WaitTimeoutError):
        client.wait(job, timeout=0.3)
    assert client.cancel(job)["status"] in {"cancelling", "cancelled"}
    assert client.wait(job)["status"] == "cancelled"


def test_pause_and_resume(client: Client) -> None:
    job = client.submit("x", parameters={"sample_size": 2, "max_iterations": 50})
    client.pause(job)
    while (current := client.get(job))["status"] != "paused":
        assert current["status"] in ("queued", "in_progress")
    assert client.pause(job)["status"] == "paused"
    assert client.resume(job["id"])["status"] in ("queued", "in_progress")
    client.cancel(job)
    assert client.wait(job)["status"] == "cancelled"
    with pytest.raises(ConflictError):
        client.resume(job)


def test_retry_and_extend_continue_in_a_new_job(system: System, client: Client, proxy: Cutter) -> None:
    short = client.wait(client.submit("x", parameters={"sample_size": 2, "max_iterations": 3, "max_output_tokens": 1}))
    assert (short["status"], short["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    before = jobs_in(system)
    proxy.lost = 1
    with Client(proxy.url) as cut:
        again = cut.retry(short)
        assert (again["source_id"], jobs_in(system)) == (short["id"], before + 1)
        proxy.lost = 1
        longer = cut.extend(short["id"], 2)
    assert (longer["parameters"]["max_iterations"], jobs_in(system)) == (5, before + 2)
    assert (
        client.extend(short, 1, idempotency_key="mine")["id"] == client.extend(short, 1, idempotency_key="mine")["id"]
    )
    client.wait_all([again, longer])
    with pytest.raises(BadRequestError):
        client.extend(short, 0)


def test_delete_is_idempotent_within_one_call(client: Client, proxy: Cutter) -> None:
    job = client.submit("x", parameters={"sample_size": 2, "max_iterations": 50})
    with pytest.raises(ConflictError):
        client.delete(job)
    client.cancel(job)
    client.wait(job)
    proxy.lost = 1
    with Client(proxy.url) as cut:
        cut.delete(job)  # the first response was lost, and the retry is a 404
    with pytest.raises(NotFoundError):
        client.delete(job)


def test_early_stop_is_reported(client: Client) -> None:
    rule = {"early_stop": {"patience": 1, "min_gain": 1000.0}}
    job = client.wait(client.submit("x", parameters={"sample_size": 2, "max_iterations": 9, **rule}))
    assert (job["status"], job["stop_reason"], job["progress"]["iteration"]) == ("completed", "early_stop", 1)


def test_list_iterates_over_pages(client: Client) -> None:
    submitted = [client.submit(f"{n}", metadata={"list": "yes"}, **SMALL)["id"] for n in range(105)]
    assert [job["id"] for job in client.list(metadata={"list": "yes"}, order="asc")] == submitted
    assert [job["id"] for job in client.list(metadata={"list": "yes"}, limit=3)] == submitted[:-4:-1]
    client.wait_all(submitted)
    assert {job["status"] for job in client.list(metadata={"list": "yes"}, status=["completed"])} == {"completed"}
    assert list(client.list(metadata={"list": "yes"}, status="failed")) == []


def test_batch_reads_rows_lazily_and_keeps_order(client: Client) -> None:
    read = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal read
        for n in range(12):
            read += 1
            yield {"prompt": {5: "   ", 7: "half a pair \ud83d"}.get(n, f"Question {n}")}

    results = client.batch(rows(), lambda row: row["prompt"], in_flight=3, **SMALL)
    first = next(results)
    assert read <= 4
    rest = list(results)
    assert [r.index for r in (first, *rest)] == list(range(12))
    for result in (first, *rest):
        if result.index in (5, 7):
            assert isinstance(result.error, BadRequestError)
            assert result.job is None
        else:
            assert result.error is None
            assert result.output
            assert result.job
            assert result.job["input"] == result.row["prompt"]


def test_invalid_row_does_not_affect_other_rows(client: Client) -> None:
    rows: list[Any] = ["a", None, 5, "\ud800", {"input": "b", "parameters": {"temperature": float("nan")}}, "c"]
    rows.insert(3, {"input": "d", "metadata": {"key": object()}})
    results = list(client.batch(rows, in_flight=2, **SMALL))
    assert [r.output is not None for r in results] == [True, False, False, False, False, False, True]
    errors = [ClientError, ClientError, ClientError, BadRequestError, BadRequestError]
    assert [type(r.error) for r in results[1:-1]] == errors
    assert "not NoneType" in str(results[1].error)


def test_other_server_at_the_url_is_reported() -> None:
    with html_server() as url, Client(url) as lost:
        for ask in (lost.get, lost.wait, lost.iterations):
            with pytest.raises(ClientError, match="no TPO server"):
                ask("job_1")


@contextlib.contextmanager
def html_server() -> Iterator[str]:
    """Run a web server that answers every request with a page, and yield its URL."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def test_batch_yields_results_as_completed(client: Client) -> None:
    slow = {"input": "slow", "parameters": {"sample_size": 2, "max_iterations": 8}}
    rows = [slow, *({"input": f"{n}", **SMALL} for n in range(4))]
    results = list(client.batch(rows, in_flight=5, in_order=False))
    assert sorted(r.index for r in results) == [0, 1, 2, 3, 4]
    assert results[-1].index == 0
    late = {"input": "x", "deadline_seconds": 3, "parameters": {"max_iterations": 50}}
    (ended,) = client.batch([late])
    assert isinstance(ended.error, JobFailedError)
    assert ended.error.job["status"] in TERMINAL - {"completed"}
    assert ended.job == ended.error.job


def test_closed_batch_ends_its_threads(client: Client) -> None:
    before = threading.active_count()
    results = client.batch([f"{n}" for n in range(100)], in_flight=4, **SMALL)
    next(results)
    results.close()  # type: ignore[attr-defined]
    eventually(lambda: threading.active_count() <= before, why="the threads of the batch should end")
    assert threading.active_count() <= before
