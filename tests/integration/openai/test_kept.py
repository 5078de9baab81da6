"""Files and batches: idempotent creation, expiry and deletion."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import openai
import pytest

from testing.jobs import execute
from testing.processes import System
from tests.integration.openai.conftest import Server, serving
from tests.integration.openai.test_batches import end, line, read, run, start

RESPONSES: Final = "/v1/responses"
HOUR: Final = 3600


@pytest.fixture(scope="module")
def batch_server(shared_system: System) -> Iterator[Server]:
    """Start an API, a worker and a maintenance worker."""
    shared_system.worker(scripted_latency=0, concurrency=8)
    shared_system.maintenance()
    with serving(shared_system) as server:
        yield server


@pytest.fixture(scope="module")
def batch_client(batch_server: Server) -> Iterator[openai.OpenAI]:
    with batch_server.client() as client:
        yield client


def idempotency_header(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


class TestIdempotency:
    def upload(self, client: openai.OpenAI, key: str, data: bytes = b"a", name: str = "a", **more: Any) -> Any:
        return client.files.with_raw_response.create(
            file=(name, data), purpose="batch", extra_headers=idempotency_header(key), **more
        )

    def test_duplicate_upload_returns_the_first_file(self, batch_client: openai.OpenAI) -> None:
        before = len(list(batch_client.files.list()))
        first, again = (self.upload(batch_client, "upload") for _ in range(2))
        assert first.parse().id == again.parse().id
        assert [a.headers.get("idempotent-replayed") for a in (first, again)] == [None, "true"]
        for other in ({"data": b"b"}, {"name": "b"}, {"expires_after": {"anchor": "created_at", "seconds": HOUR}}):
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                self.upload(batch_client, "upload", **other)
            assert caught.value.code == "idempotency_key_reused"
        assert len(list(batch_client.files.list())) == before + 1
        assert self.upload(batch_client, "another").parse().id != first.parse().id
        batch_client.files.delete(first.parse().id)
        assert "idempotent-replayed" not in self.upload(batch_client, "upload", b"b").headers

    def test_concurrent_equal_uploads_create_one_file(self, batch_client: openai.OpenAI, batch_server: Server) -> None:
        data = b"x" * 600_000  # several parts, so that the uploads overlap
        with ThreadPoolExecutor(8) as pool, serving(batch_server.system) as second, second.client() as other:
            responses = list(pool.map(lambda i: self.upload((batch_client, other)[i % 2], "many", data), range(16)))
        ids = Counter(response.parse().id for response in responses)
        assert len(ids) == 1
        assert sum("idempotent-replayed" not in response.headers for response in responses) == 1
        assert batch_client.files.content(next(iter(ids))).read() == data
        with batch_server.system.engine.connect() as connection:
            query = "SELECT count(*) FROM files WHERE NOT complete AND purpose = 'batch'"
            assert connection.exec_driver_sql(query).scalar() == 0

    def test_duplicate_batch_is_created_once(self, batch_client: openai.OpenAI) -> None:
        file = self.upload(batch_client, "input", line("a").encode()).parse()

        def ask(_i: int = 0, window: Any = "24h", key: str = "batch") -> Any:
            return batch_client.batches.with_raw_response.create(
                input_file_id=file.id,
                endpoint=RESPONSES,
                completion_window=window,
                extra_headers=idempotency_header(key),
            )

        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(ask, range(16)))
        assert len({response.parse().id for response in responses}) == 1
        assert sum("idempotent-replayed" not in response.headers for response in responses) == 1
        for window, key in (("1h", "batch"), ("24h", "input")):
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                ask(window=window, key=key)
            assert caught.value.code == "idempotency_key_reused"
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ask(key="x" * 256)
        assert caught.value.param == "Idempotency-Key"

    def test_key_belongs_to_its_tenant_and_expires(self, batch_client: openai.OpenAI, batch_server: Server) -> None:
        first = self.upload(batch_client, "mine").parse()
        secret = batch_server.system.store.keys.create("theirs", "another").secret
        with batch_server.client(secret) as stranger:
            assert self.upload(stranger, "mine").parse().id != first.id
        execute(batch_server.system.engine, "UPDATE idempotency_keys SET created_at = 1 WHERE key = 'mine'")
        assert self.upload(batch_client, "mine").parse().id != first.id


class TestExpiry:
    def test_file_expires_at_the_requested_time(self, batch_client: openai.OpenAI, batch_server: Server) -> None:
        file = batch_client.files.create(
            file=("a", line("a").encode()), purpose="batch", expires_after={"anchor": "created_at", "seconds": HOUR}
        )
        assert file.expires_at == pytest.approx(file.created_at + HOUR, abs=1)
        assert batch_client.files.create(file=("a", b"a"), purpose="batch").expires_at is None
        execute(batch_server.system.engine, f"UPDATE files SET expires_at = 1 WHERE id = '{file.id}'")
        for call in (batch_client.files.retrieve, batch_client.files.content, batch_client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file.id)
        assert file.id not in [f.id for f in batch_client.files.list()]
        with pytest.raises(openai.NotFoundError):
            batch_client.batches.create(input_file_id=file.id, endpoint=RESPONSES, completion_window="24h")

    @pytest.mark.parametrize(
        ("wrong", "param"),
        [
            ({"anchor": "created_at", "seconds": HOUR - 1}, "expires_after[seconds]"),
            ({"anchor": "created_at", "seconds": 30 * 24 * HOUR + 1}, "expires_after[seconds]"),
            ({"anchor": "created_at", "seconds": "soon"}, "expires_after[seconds]"),
            ({"anchor": "last_active_at", "seconds": HOUR}, "expires_after[anchor]"),
            ({"anchor": "created_at"}, "expires_after[seconds]"),
            ({"seconds": HOUR}, "expires_after[anchor]"),
            ({"anchor": "created_at", "seconds": HOUR, "more": 1}, "expires_after[more]"),
        ],
    )
    def test_invalid_expiry_is_rejected(self, batch_client: openai.OpenAI, wrong: Any, param: str) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            batch_client.files.create(file=("a", b"a"), purpose="batch", expires_after=wrong)
        assert caught.value.param == param

    def test_result_files_expire_at_the_requested_time(self, batch_client: openai.OpenAI) -> None:
        file = batch_client.files.create(file=("a", (line("a") + "\n{}").encode()), purpose="batch")
        batch = end(
            batch_client,
            batch_client.batches.create(
                input_file_id=file.id,
                endpoint=RESPONSES,
                completion_window="24h",
                output_expires_after={"anchor": "created_at", "seconds": HOUR},
            ),
        )
        for name in (batch.output_file_id, batch.error_file_id):
            assert name
            file = batch_client.files.retrieve(name)
            assert file.expires_at == pytest.approx(file.created_at + HOUR, abs=1)

    def test_deleting_a_batch_deletes_its_results(self, batch_client: openai.OpenAI, batch_server: Server) -> None:
        batch = run(batch_client, line("a") + "\n{}")
        assert batch.output_file_id
        assert batch.error_file_id
        job_id = read(batch_client, batch.output_file_id)[0]["response"]["request_id"]
        deleted: Any = batch_client.delete(f"/batches/{batch.id}", cast_to=object)
        assert deleted == {"id": batch.id, "object": "batch", "deleted": True}
        with pytest.raises(openai.NotFoundError):
            batch_client.batches.retrieve(batch.id)
        for gone in (batch.output_file_id, batch.error_file_id):
            with pytest.raises(openai.NotFoundError):
                batch_client.files.retrieve(gone)
        assert batch_client.files.retrieve(batch.input_file_id)
        assert batch_server.system.store.jobs.get(job_id).status == "completed"
        with pytest.raises(openai.NotFoundError):
            batch_client.delete(f"/batches/{batch.id}", cast_to=object)

    def test_running_batch_cannot_be_deleted(self, idle_client: openai.OpenAI) -> None:
        batch = start(idle_client, line("a"))
        with pytest.raises(openai.ConflictError) as caught:
            idle_client.delete(f"/batches/{batch.id}", cast_to=object)
        assert caught.value.code == "wrong_state"
