"""The Python client against a real server and worker: cuts, errors for a moment, requests sent twice, batches."""

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
    """A server and a worker for the whole file."""
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


def test_submit_wait_and_the_record(client: Client) -> None:
    seen: list[Job] = []
    job = client.submit("Where is it?", metadata={"row": "1"}, parameters={"sample_size": 2, "max_iterations": 8})
    assert job["metadata"] == {"row": "1"}
    ended = client.wait(job, progress=seen.append)
    assert ended["status"] == "completed"
    assert ended["output"]
    assert seen[-1] == ended
    assert len(seen) > 2  # it was told what happened in between
    assert client.get(job["id"]) == ended == client.cancel(job)
    assert [i["number"] for i in client.iterations(job)] == list(range(9))
    assert len(client.candidates(job)) == 18


def test_events_come_as_they_happen(client: Client) -> None:
    job = client.submit("Hello", **SMALL)
    told = list(client.events(job))
    assert [e["sequence_number"] for e in told] == list(range(1, len(told) + 1))
    assert told[-1]["type"] == "job.completed"
    assert list(client.events(job, starting_after=3)) == told[3:]
    assert list(client.events(job, starting_after=len(told))) == list(client.events(job, starting_after=9999)) == []


def test_an_event_stream_that_is_cut_is_resumed(client: Client, proxy: Cutter) -> None:
    job = client.submit("Hello", **SMALL)
    proxy.budgets = [100, 300, 500, 700, 900, 1100]
    with Client(proxy.url) as cut:
        told = list(cut.events(job))
    assert proxy.connections >= 5
    assert told == list(client.events(job))


def test_a_submission_whose_answer_is_lost_makes_one_job(system: System, proxy: Cutter) -> None:
    before = jobs_in(system)
    proxy.lost = 2
    with Client(proxy.url) as client:
        job = client.submit("Hello", **SMALL)
    assert proxy.connections == 3
    assert system.store.jobs.get(job["id"]).id == job["id"]
    assert jobs_in(system) == before + 1


def test_a_key_of_ones_own_holds_over_calls_and_clients(system: System, client: Client) -> None:
    before = jobs_in(system)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: client.submit("Hello", idempotency_key="one", **SMALL)["id"], range(20)))
    assert len(set(made)) == 1
    assert jobs_in(system) == before + 1
    with pytest.raises(BadRequestError) as refused:
        client.submit("Other", idempotency_key="one", **SMALL)
    assert refused.value.code == "idempotency_key_reused"
    assert client.submit("Hello", **SMALL)["id"] != client.submit("Hello", **SMALL)["id"]


def test_what_fails_for_a_moment_is_tried_again_when_the_server_says(system: System, proxy: Cutter) -> None:
    before = jobs_in(system)
    proxy.refusals = 2
    began = time.monotonic()
    with Client(proxy.url) as client:
        client.submit("Hello", **SMALL)
    assert time.monotonic() - began > 2
    assert proxy.connections == 3
    assert jobs_in(system) == before + 1


def test_what_goes_on_failing_is_an_error_of_its_kind(proxy: Cutter) -> None:
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
        patient.get("job_1")  # nobody waits for hours


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


def test_what_no_json_holds_is_an_error_that_names_the_field(client: Client) -> None:
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
def test_a_key_that_no_header_carries_is_said_without_it(key: str) -> None:
    with pytest.raises(ClientError, match="API key") as refused:
        Client(api_key=key)
    assert key not in str(refused.value)


def test_a_key(system: System) -> None:
    with started_api(system, api_key=KEY) as api:
        with Client(api.url, "another-key-that-is-wrong") as stranger, pytest.raises(AuthenticationError):
            next(stranger.list())
        with Client(api.url, KEY) as known:
            assert known.get(known.submit("x", **SMALL)["id"])["status"] in {"queued", "in_progress", "completed"}


def test_waiting_ends_when_the_time_is_up(client: Client) -> None:
    job = client.submit("x", model=None, parameters={"sample_size": 2, "max_iterations": 50})
    client.pause(job)  # it does not end meanwhile, however slow this machine is
    with pytest.raises(WaitTimeoutError):
        client.wait(job, timeout=0.3)
    assert client.cancel(job)["status"] in {"cancelling", "cancelled"}
    assert client.wait(job)["status"] == "cancelled"


def test_a_job_is_held_and_let_go(client: Client) -> None:
    job = client.submit("x", parameters={"sample_size": 2, "max_iterations": 50})
    client.pause(job)
    while (held := client.get(job))["status"] != "paused":
        assert held["status"] in ("queued", "in_progress")
    assert client.pause(job)["status"] == "paused"
    assert client.resume(job["id"])["status"] in ("queued", "in_progress")
    client.cancel(job)
    assert client.wait(job)["status"] == "cancelled"
    with pytest.raises(ConflictError):
        client.resume(job)


def test_a_job_goes_on_in_another(system: System, client: Client, proxy: Cutter) -> None:
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


def test_a_job_is_deleted_once(client: Client, proxy: Cutter) -> None:
    job = client.submit("x", parameters={"sample_size": 2, "max_iterations": 50})
    with pytest.raises(ConflictError):
        client.delete(job)
    client.cancel(job)
    client.wait(job)
    proxy.lost = 1
    with Client(proxy.url) as cut:
        cut.delete(job)  # the first answer was lost, and the second says that there is no such job
    with pytest.raises(NotFoundError):
        client.delete(job)


def test_early_stop_is_told(client: Client) -> None:
    rule = {"early_stop": {"patience": 1, "min_gain": 1000.0}}
    job = client.wait(client.submit("x", parameters={"sample_size": 2, "max_iterations": 9, **rule}))
    assert (job["status"], job["stop_reason"], job["progress"]["iteration"]) == ("completed", "early_stop", 1)


def test_lists_go_over_pages(client: Client) -> None:
    made = [client.submit(f"{n}", metadata={"list": "yes"}, **SMALL)["id"] for n in range(105)]
    assert [job["id"] for job in client.list(metadata={"list": "yes"}, order="asc")] == made
    assert [job["id"] for job in client.list(metadata={"list": "yes"}, limit=3)] == made[:-4:-1]
    client.wait_all(made)
    assert {job["status"] for job in client.list(metadata={"list": "yes"}, status=["completed"])} == {"completed"}
    assert list(client.list(metadata={"list": "yes"}, status="failed")) == []


def test_a_batch_is_drawn_as_it_runs_and_gives_results_in_order(client: Client) -> None:
    drawn = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal drawn
        for n in range(12):
            drawn += 1
            yield {"prompt": {5: "   ", 7: "half a pair \ud83d"}.get(n, f"Question {n}")}

    results = client.batch(rows(), lambda row: row["prompt"], in_flight=3, **SMALL)
    first = next(results)
    assert drawn <= 4
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


def test_what_cannot_be_sent_disturbs_no_other_row(client: Client) -> None:
    rows: list[Any] = ["a", None, 5, "\ud800", {"input": "b", "parameters": {"temperature": float("nan")}}, "c"]
    rows.insert(3, {"input": "d", "metadata": {"key": object()}})
    results = list(client.batch(rows, in_flight=2, **SMALL))
    assert [r.output is not None for r in results] == [True, False, False, False, False, False, True]
    refused = [ClientError, ClientError, ClientError, BadRequestError, BadRequestError]
    assert [type(r.error) for r in results[1:-1]] == refused
    assert "no NoneType" in str(results[1].error)


def test_another_server_at_the_address() -> None:
    with another_server() as url, Client(url) as lost:
        for ask in (lost.get, lost.wait, lost.iterations):
            with pytest.raises(ClientError, match="no TPO server"):
                ask("job_1")


@contextlib.contextmanager
def another_server() -> Iterator[str]:
    """A web server that answers every request with a page."""

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


def test_a_batch_as_it_comes(client: Client) -> None:
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


def test_a_batch_that_nobody_listens_to_ends(client: Client) -> None:
    before = threading.active_count()
    results = client.batch([f"{n}" for n in range(100)], in_flight=4, **SMALL)
    next(results)
    results.close()  # type: ignore[attr-defined]
    eventually(lambda: threading.active_count() <= before, why="its threads have ended")
    assert threading.active_count() <= before
