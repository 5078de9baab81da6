"""Tenants and their keys, on both databases."""

from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import Engine, event

from tests.contract.test_store_faults import at_once
from tests.fakes import new_state
from tests.jobs import claim, create, drive, execute, rows
from tpo.errors import InvalidInput, JobNotFound, KeyNotFound, NotFound
from tpo.jobs.store import Store


def test_a_key_opens_its_tenant_and_stands_nowhere(engine: Engine, store: Store) -> None:
    assert not store.has_keys()
    row, secret = store.create_key("laptop", "acme")
    assert (row.tenant, row.name, row.revoked_at) == ("acme", "laptop", None)
    assert store.has_keys()
    assert store.tenant_of(secret) == "acme"
    for wrong in ("", secret + "x", secret[:-1], row.hash, "\udcff"):
        assert store.tenant_of(wrong) is None
    assert secret not in str(rows(engine))
    assert secret[4:] not in str(rows(engine))


def test_a_revoked_key_opens_nothing_and_does_not_open_the_server(engine: Engine, store: Store) -> None:
    first, second = store.create_key("one", "acme"), store.create_key("two", "acme")
    # Keys of one millisecond have an order of their own.
    execute(engine, "UPDATE api_keys SET created_at = created_at - 1 WHERE id = :id", id=first.row.id)
    revoked = store.revoke_key(first.row.id)
    assert revoked.revoked_at is not None
    assert store.tenant_of(first.secret) is None
    assert store.tenant_of(second.secret) == "acme"
    before = rows(engine)
    store.revoke_key(first.row.id)
    assert rows(engine) == before
    store.revoke_key(second.row.id)
    assert store.has_keys()
    assert [key.id for key in store.list_keys()] == [first.row.id, second.row.id]
    with pytest.raises(KeyNotFound):
        store.revoke_key("key_none")


@pytest.mark.parametrize("tenant", ["", "a b", "x" * 65, "-x", "a\x00", "ä", "a\n"])
def test_a_tenant_has_a_plain_name(store: Store, tenant: str) -> None:
    with pytest.raises(InvalidInput):
        store.create_key("k", tenant)


def test_a_stranger_s_job_is_not_there(engine: Engine, store: Store) -> None:
    acme, other = store.of("acme"), store.of("other")
    job_id = create(acme, new_state(sample_size=1, max_iterations=1))
    drive(acme, *claim(store, create(acme)))
    before = rows(engine)
    for stranger in (other, store):
        for ask in (stranger.get, stranger.state, stranger.cancel):
            with pytest.raises(JobNotFound):
                ask(job_id)
        assert stranger.events(job_id) == []
        assert stranger.page(limit=9) == []
        assert stranger.page(limit=9, statuses=["queued"]) == []
    assert rows(engine) == before
    assert len(acme.page(limit=9)) == 2
    assert acme.get(job_id).tenant == "acme"


def test_workers_work_for_every_tenant(store: Store) -> None:
    for tenant in ("acme", "other"):
        assert claim(store, create(store.of(tenant)))
    create(store.of("acme"))
    bells = store.sweep(ring_again_seconds=-1, forget_worker_seconds=60)
    assert len(bells) == 1


def test_a_list_is_read_off_an_index(engine: Engine) -> None:
    plans = {
        "sqlite": ("EXPLAIN QUERY PLAN ", "jobs_by_tenant"),
        "postgresql": ("EXPLAIN ", "jobs_by_tenant"),
    }
    explain, index = plans[engine.dialect.name]
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off")
        plan = str(
            connection.exec_driver_sql(
                f"{explain} SELECT id FROM jobs WHERE tenant = 'acme' AND id < 'job_9' ORDER BY id DESC LIMIT 20"
            ).all()
        )
    assert index in plan
    assert "Sort" not in plan
    assert "TEMP B-TREE" not in plan


def test_the_database_does_the_same_for_a_stranger_s_job_as_for_none(engine: Engine, store: Store) -> None:
    job_id = create(store.of("acme"))
    asked: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _r, statement, *_: asked.append(statement))

    def statements(ask: Callable[[str], object], job_id: str) -> list[str]:
        asked.clear()
        with pytest.raises(JobNotFound):
            ask(job_id)
        return list(asked)

    asks = (store.get, store.state, store.cancel, store.pause, store.resume, store.retry_now, store.forget)
    for ask in asks:
        assert statements(ask, job_id) == statements(ask, "job_" + "0" * 32) != []


def test_so_it_does_for_files_batches_and_webhooks(engine: Engine, store: Store) -> None:
    theirs = store.of("acme")
    file_id = theirs.begin_file("a", "batch")
    theirs.complete_file(file_id)
    batch_id = theirs.create_batch(
        endpoint="/v1/responses", input_file_id=file_id, window="24h", seconds=9, metadata={}
    ).batch.id
    webhook_id = theirs.create_webhook("https://example.org", ["job.completed"]).row.id
    asked: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _r, statement, *_: asked.append(statement))

    def statements(ask: Callable[[str], object], unknown: str) -> list[str]:
        asked.clear()
        with pytest.raises(NotFound):
            ask(unknown)
        return list(asked)

    def start(file_id: str) -> object:
        return store.create_batch(endpoint="/v1/responses", input_file_id=file_id, window="24h", seconds=9, metadata={})

    asks: list[tuple[str, Callable[[str], object]]] = [
        *((file_id, ask) for ask in (store.file, store.delete_file, start)),
        *((batch_id, ask) for ask in (store.batch, store.cancel_batch, store.forget_batch)),
        *((webhook_id, ask) for ask in (store.webhook, store.delete_webhook, store.ping_webhook)),
        (webhook_id, lambda which: store.deliveries_page(which, limit=9)),
        (webhook_id, lambda which: store.update_webhook(which, {"enabled": False})),
        (webhook_id, lambda which: store.rotate_secret(which, 0)),
    ]
    for real, ask in asks:
        assert statements(ask, real) == statements(ask, real[:-4] + "0000") != []


def test_many_make_keys_of_a_new_tenant_at_once(store: Store) -> None:
    made = at_once(*[partial(store.create_key, f"key {i}", "acme") for i in range(8)])
    assert len({new.secret for new in made}) == 8  # type: ignore[attr-defined]
    assert {key.tenant for key in store.list_keys()} == {"acme"}
