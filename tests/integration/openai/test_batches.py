"""Files and batches through the official client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx2
import openai
import pytest
from openai.types import Batch

from testing.processes import System
from testing.waiting import eventually
from tests.integration.openai.conftest import Server, serving
from tests.support.api_client import KEY

RESPONSES: Final = "/v1/responses"
CHAT: Final = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")
ONE_CALL = {"sample_size": 1, "max_iterations": 0}


@pytest.fixture(scope="module")
def batch_server(shared_system: System) -> Iterator[Server]:
    """Start an API, a worker and a maintenance worker."""
    shared_system.worker(scripted_latency=0, concurrency=8)
    shared_system.maintenance(max_batch_lines=1000, batch_jobs=50)
    with serving(shared_system) as server:
        yield server


@pytest.fixture(scope="module")
def batch_client(batch_server: Server) -> Iterator[openai.OpenAI]:
    with batch_server.client() as client:
        yield client


def line(custom_id: Any, url: str = RESPONSES, **body: Any) -> str:
    defaults: dict[str, Any] = (
        {"input": "Hello"} if url == RESPONSES else {"messages": [{"role": "user", "content": "Hi"}]}
    )
    body = {**defaults, "model": "scripted", "tpo": ONE_CALL, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def start(client: openai.OpenAI, text: str | bytes, url: Any = RESPONSES, window: Any = "24h") -> Batch:
    data = text.encode() if isinstance(text, str) else text
    file = client.files.create(file=("requests.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=url, completion_window=window, metadata={"set": "test"}
    )


def end(client: openai.OpenAI, batch: Batch) -> Batch:
    def ended() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ENDED else None

    return eventually(ended, why="the batch should end")


def read(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()] if file_id else []


def run(client: openai.OpenAI, text: str | bytes, url: str = RESPONSES) -> Batch:
    return end(client, start(client, text, url))


class TestFiles:
    def test_content_is_stored_unchanged(self, batch_client: openai.OpenAI, tmp_path: Path) -> None:
        data = b"".join(b"%d\r\n" % i for i in range(150_000))
        (tmp_path / "large.jsonl").write_bytes(data)
        file = batch_client.files.create(file=tmp_path / "large.jsonl", purpose="batch")
        assert (file.bytes, file.filename, file.purpose) == (len(data), "large.jsonl", "batch")
        assert batch_client.files.retrieve(file.id).bytes == len(data)
        assert batch_client.files.content(file.id).read() == data
        assert file.id in [f.id for f in batch_client.files.list(limit=2)]
        assert batch_client.files.delete(file.id).deleted
        for gone in (file.id, "file-0", "file-" + "0" * 32):
            with pytest.raises(openai.NotFoundError):
                batch_client.files.retrieve(gone)
            with pytest.raises(openai.NotFoundError):
                batch_client.files.content(gone)
            with pytest.raises(openai.NotFoundError):
                batch_client.files.delete(gone)

    def test_other_purposes_and_fields_are_rejected(self, batch_client: openai.OpenAI) -> None:
        with pytest.raises(openai.UnprocessableEntityError, match="purpose"):
            batch_client.files.create(file=("a", b"a"), purpose="vision")
        with pytest.raises(openai.UnprocessableEntityError, match="colour"):
            batch_client.files.create(file=("a", b"a"), purpose="batch", extra_body={"colour": "red"})

    def test_too_large_file_is_rejected(self, sqlite_system: System) -> None:
        with serving(sqlite_system, max_file_bytes=100_000) as server, server.client() as client:
            with pytest.raises(openai.APIStatusError) as caught:
                client.files.create(file=("a", b"x" * 300_000), purpose="batch")
            assert caught.value.status_code == 413
            assert list(client.files.list()) == []

    @pytest.mark.parametrize(
        ("kind", "body", "status"),
        [
            ("application/json", b"{}", 415),
            ("multipart/form-data", b"x", 422),
            ("multipart/form-data; boundary=b", b"x", 422),
            ("multipart/form-data; boundary=b", b"--b--", 422),
            (
                "multipart/form-data; boundary=b",
                b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--',
                422,
            ),
        ],
    )
    def test_invalid_form_is_rejected(self, batch_server: Server, kind: str, body: bytes, status: int) -> None:
        headers = {"content-type": kind, "authorization": f"Bearer {KEY}"}
        response = httpx2.post(f"{batch_server.url}/v1/files", headers=headers, content=body)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]

    def test_file_of_another_tenant_is_not_found(self, batch_client: openai.OpenAI, batch_server: Server) -> None:
        file = batch_client.files.create(file=("a", line("a").encode()), purpose="batch")
        batch = start(batch_client, line("a"))
        secret = batch_server.system.store.keys.create("stranger", "strangers").secret
        with batch_server.client(secret) as stranger:
            assert list(stranger.files.list()) == []
            assert list(stranger.batches.list()) == []
            with pytest.raises(openai.NotFoundError):
                stranger.files.content(file.id)
            with pytest.raises(openai.NotFoundError):
                stranger.batches.cancel(batch.id)
            with pytest.raises(openai.NotFoundError):
                stranger.batches.create(input_file_id=file.id, endpoint=RESPONSES, completion_window="24h")


class TestBatches:
    @pytest.mark.parametrize("url", [RESPONSES, CHAT])
    def test_results_are_in_the_order_of_the_requests(self, batch_client: openai.OpenAI, url: str) -> None:
        batch = run(batch_client, "\n".join(line(f"r{i}", url) for i in range(60)), url)
        assert (batch.status, batch.error_file_id, batch.metadata) == ("completed", None, {"set": "test"})
        counts, usage = batch.request_counts, batch.usage
        assert counts
        assert usage
        assert (counts.total, counts.completed, counts.failed) == (60, 60, 0)
        results = read(batch_client, batch.output_file_id)
        assert [r["custom_id"] for r in results] == [f"r{i}" for i in range(60)]
        for result in results:
            assert (result["response"]["status_code"], result["error"]) == (200, None)
        bodies = [r["response"]["body"] for r in results]
        if url == RESPONSES:
            assert all(b["output"][0]["content"][0]["text"] for b in bodies)
            assert sum(b["usage"]["total_tokens"] for b in bodies) == usage.total_tokens
        else:
            assert all(b["choices"][0]["message"]["content"] for b in bodies)
        assert batch.output_file_id
        assert batch_client.files.retrieve(batch.output_file_id).purpose == "batch_output"

    def test_invalid_line_does_not_affect_others(self, batch_client: openai.OpenAI) -> None:
        text = "\r\n".join(
            [
                "\ufeff" + line("good"),
                '{"custom_id": "broken"',
                "",
                line("good"),
                line("elsewhere", CHAT),
                line("hot", temperature=9),
                "   ",
                line("nobody", model="gpt-9"),
                line("deep", input=[{"role": "user", "content": "x"}], instructions="Be kind."),
                line(7),
                line("long", input="x" * 200_001),
                "",
            ]
        )
        batch = run(batch_client, text)
        assert batch.status == "completed"
        assert batch.request_counts
        assert batch.request_counts.to_dict() == {"total": 9, "completed": 2, "failed": 7}
        assert [r["custom_id"] for r in read(batch_client, batch.output_file_id)] == ["good", "deep"]
        errors = {r["error"]["line"]: (r["custom_id"], r["error"]) for r in read(batch_client, batch.error_file_id)}
        found = {number: (name, e["code"], e["param"]) for number, (name, e) in errors.items()}
        assert found == {
            2: (None, "invalid_input", None),
            4: ("good", "duplicate_custom_id", "custom_id"),
            5: ("elsewhere", "invalid_input", "url"),
            6: ("hot", "invalid_input", "temperature"),
            8: ("nobody", "unknown_model", "model"),
            10: (None, "invalid_input", "custom_id"),
            11: ("long", "invalid_input", "input"),
        }
        assert "line 1" in errors[4][1]["message"]

    @pytest.mark.parametrize("text", ["", "\r\n\n  \n"])
    def test_file_without_requests_fails_the_batch(self, batch_client: openai.OpenAI, text: str) -> None:
        batch = run(batch_client, text)
        assert batch.status == "failed"
        assert batch.errors
        assert [e.code for e in batch.errors.data or []] == ["empty_file"]

    def test_file_with_too_many_requests_fails_the_batch(self, batch_client: openai.OpenAI) -> None:
        batch = run(batch_client, "{}\n" * 1001)
        assert batch.errors
        assert [e.code for e in batch.errors.data or []] == ["too_many_requests"]

    def test_invalid_batch_is_rejected(self, batch_client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            batch_client.batches.create(input_file_id="file-1", endpoint=RESPONSES, completion_window="24h")
        file = batch_client.files.create(file=("a", b""), purpose="batch")
        for wrong in ({"endpoint": "/v1/embeddings"}, {"completion_window": "soon"}):
            arguments: Any = {"input_file_id": file.id, "endpoint": RESPONSES, "completion_window": "24h", **wrong}
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                batch_client.batches.create(**arguments)
            assert caught.value.param == next(iter(wrong))
        output = run(batch_client, line("a")).output_file_id
        assert output
        with pytest.raises(openai.UnprocessableEntityError):
            batch_client.batches.create(input_file_id=output, endpoint=RESPONSES, completion_window="24h")

    def test_batches_are_listed_in_pages(self, batch_client: openai.OpenAI) -> None:
        created = [start(batch_client, line("a")).id for _ in range(3)]
        assert [b.id for _, b in zip(range(3), batch_client.batches.list(limit=2), strict=False)] == created[::-1]
        for batch_id in ("batch_" + "0" * 32, "batch_1"):
            with pytest.raises(openai.NotFoundError):
                batch_client.batches.retrieve(batch_id)

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.long)])
    def test_batch_can_exceed_the_concurrent_jobs(self, batch_client: openai.OpenAI, count: int) -> None:
        text = "\n".join(line(f"r{i}", tpo={**ONE_CALL, "seed": i}) for i in range(count))
        batch = end(batch_client, start(batch_client, text))
        assert batch.request_counts
        assert batch.request_counts.completed == count
        assert [r["custom_id"] for r in read(batch_client, batch.output_file_id)] == [f"r{i}" for i in range(count)]


class TestEnds:
    """Batches that are interrupted before all requests are completed."""

    def test_cancel_keeps_completed_requests(self, system: System) -> None:
        with serving(system) as server, server.client() as client:
            system.maintenance(batch_jobs=8)
            system.worker(scripted_latency=0.3, concurrency=4)
            text = "\n".join(line(f"r{i}") for i in range(40))
            batch = start(client, text)
            eventually(lambda: _completed(client, batch) >= 4, why="some requests should be completed")
            with pytest.raises(openai.ConflictError):
                client.files.delete(batch.input_file_id)
            assert client.batches.cancel(batch.id).status == "cancelling"
            cancelled = end(client, batch)
            assert cancelled.status == "cancelled"
            assert cancelled.cancelled_at
            assert client.batches.cancel(batch.id).status == "cancelled"
            completed = read(client, cancelled.output_file_id)
            cancelled_requests = read(client, cancelled.error_file_id)
            assert len(completed) >= 4
            assert cancelled_requests
            assert {r["error"]["code"] for r in cancelled_requests} == {"batch_cancelled"}
            assert sorted(r["custom_id"] for r in completed + cancelled_requests) == sorted(f"r{i}" for i in range(40))
            assert client.files.delete(batch.input_file_id).deleted

    def test_cancel_before_the_start_counts_all_requests(self, system: System) -> None:
        with serving(system) as server, server.client() as client:
            batch = start(client, "\n".join(["", *(line(f"r{i}") for i in range(60)), "no request"]))
            assert client.batches.cancel(batch.id).status == "cancelling"
            system.maintenance()
            cancelled = end(client, batch)
            assert (cancelled.status, cancelled.output_file_id) == ("cancelled", None)
            counts = cancelled.request_counts
            assert counts
            assert (counts.total, counts.completed, counts.failed) == (61, 0, 61)
            assert len(read(client, cancelled.error_file_id)) == 61

    def test_expired_batch_keeps_completed_requests(self, system: System) -> None:
        with serving(system) as server, server.client() as client:
            system.maintenance(batch_jobs=4)
            system.worker(scripted_latency=0.1, concurrency=2)  # about a second for each request: 200 take 100 s
            batch = start(client, "\n".join(line(f"r{i}") for i in range(200)), window="8s")
            expired = end(client, batch)
            assert expired.status == "expired"
            completed, expired_requests = read(client, expired.output_file_id), read(client, expired.error_file_id)
            assert completed
            assert {r["error"]["code"] for r in expired_requests} == {"batch_expired"}
            assert [r["custom_id"] for r in completed] == [
                f"r{i}" for i in range(200) if f"r{i}" in {d["custom_id"] for d in completed}
            ]
            assert len(completed) + len(expired_requests) == 200

    def test_batch_respects_the_quota_of_its_tenant(self, sqlite_system: System) -> None:
        system = sqlite_system
        with serving(system) as server, server.client() as client:
            system.maintenance(max_jobs_in_flight=3)
            batch = start(client, "\n".join(line(f"r{i}") for i in range(20)))

            def steps() -> int:
                return system.store.batches.get(batch.id).step

            eventually(lambda: len(system.store.jobs.page(limit=50)) == 3, why="jobs should be created up to the quota")
            known = steps()
            eventually(lambda: steps() >= known + 3, why="the batch should be advanced")
            assert len(system.store.jobs.page(limit=50)) == 3
            system.worker(scripted_latency=0)
            counts = end(client, batch).request_counts
            assert counts
            assert counts.completed == 20

    def test_killed_maintenance_creates_every_job_once(self, system: System) -> None:
        with serving(system) as server, server.client() as client:
            system.worker(scripted_latency=0, concurrency=8)
            batch = start(client, "\n".join(line(f"r{i}") for i in range(150)))
            killed = 0
            while client.batches.retrieve(batch.id).status not in ENDED:
                maintenance = system.maintenance(batch_jobs=40)
                known = _completed(client, batch)
                if killed < 4:
                    eventually(lambda: _completed(client, batch) > known or _ended(client, batch), why="it advances")  # noqa: B023
                    maintenance.kill()
                    killed += 1
                else:
                    end(client, batch)
            found = client.batches.retrieve(batch.id)
            assert found.request_counts
            assert found.request_counts.to_dict() == {"total": 150, "completed": 150, "failed": 0}
            assert [r["custom_id"] for r in read(client, found.output_file_id)] == [f"r{i}" for i in range(150)]
            jobs: Any = client.get("/jobs?limit=100", cast_to=object)
            count = len(jobs["data"])
            while jobs["has_more"]:
                jobs = client.get(f"/jobs?limit=100&after={jobs['last_id']}", cast_to=object)
                count += len(jobs["data"])
            assert count == 150


def _completed(client: openai.OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts
    return counts.completed


def _ended(client: openai.OpenAI, batch: Batch) -> bool:
    return client.batches.retrieve(batch.id).status in ENDED
