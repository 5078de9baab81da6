"""Tenants and their API keys, on both databases."""

from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import Engine, event

from testing.fakes import new_state
from testing.jobs import claim, create, drive, execute, rows
from tests.support.concurrency import run_together
from tpo.core.errors import InvalidInputError, JobNotFoundError, KeyExpiredError, KeyNotFoundError, NotFoundError
from tpo.store import Store


def test_key_identifies_tenant_and_is_not_stored(engine: Engine, store: Store) -> None:
    assert not store.keys.any_exists()
    row, secret = store.keys.create("laptop", "acme")
    assert (row.tenant, row.name, row.revoked_at) == ("acme", "laptop", None)
    assert store.keys.any_exists()
    assert store.keys.tenant_of(secret) == "acme"
    for wrong in ("", secret + "x", secret[:-1], row.hash, "\udcff"):
        assert store.keys.tenant_of(wrong) is None
    assert secret not in str(rows(engine))
    assert secret[4:] not in str(rows(engine))


def test_revoked_key_is_rejected_and_server_stays_protected(engine: Engine, store: Store) -> None:
    first, second = store.keys.create("one", "acme"), store.keys.create("two", "acme")
    # Keys of the same millisecond sort in random order.
    execute(engine, "UPDATE api_keys SET created_at = created_at - 1 WHERE id = :id", id=first.row.id)
    revoked = store.keys.revoke(first.row.id)
    assert revoked.revoked_at is not None
    assert store.keys.tenant_of(first.secret) is None
    assert store.keys.tenant_of(second.secret) == "acme"
    before = rows(engine)
    store.keys.revoke(first.row.id)
    assert rows(engine) == before
    store.keys.revoke(second.row.id)
    assert store.keys.any_exists()
    assert [key.id for key in store.keys.page()] == [first.row.id, second.row.id]
    with pytest.raises(KeyNotFoundError):
        store.keys.revoke("key_none")


def test_expired_key_is_refused_by_the_databases_clock(engine: Engine, store: Store) -> None:
    lasting, expiring = store.keys.create("one", "acme"), store.keys.create("two", "acme", expires_in=90 * 86_400)
    assert lasting.row.expires_at is None
    assert expiring.row.expires_at == pytest.approx(expiring.row.created_at + 90 * 86_400)
    assert {key.id: key.expires_at for key in store.keys.page()} == {
        lasting.row.id: None,
        expiring.row.id: expiring.row.expires_at,
    }
    assert store.keys.tenant_of(expiring.secret) == "acme"
    execute(engine, "UPDATE api_keys SET expires_at = created_at - 1 WHERE id = :id", id=expiring.row.id)
    with pytest.raises(KeyExpiredError, match="has expired"):
        store.keys.tenant_of(expiring.secret)
    assert store.keys.tenant_of(lasting.secret) == "acme"
    assert store.keys.tenant_of(expiring.secret + "x") is None
    store.keys.revoke(expiring.row.id)
    assert store.keys.tenant_of(expiring.secret) is None
    assert store.keys.any_exists()


def test_only_key_stays_required_after_it_expired(engine: Engine, store: Store) -> None:
    store.keys.create("only", "acme", expires_in=1)
    execute(engine, "UPDATE api_keys SET expires_at = created_at - 1")
    assert store.keys.any_exists()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 101 * 366 * 86_400])
def test_key_creation_refuses_invalid_expiry(store: Store, seconds: float) -> None:
    with pytest.raises(InvalidInputError, match="expires"):
        store.keys.create("k", "acme", expires_in=seconds)
    assert not store.keys.any_exists()


@pytest.mark.parametrize("tenant", ["", "a b", "x" * 65, "-x", "a\x00", "ä", "a\n"])
def test_key_creation_refuses_invalid_tenant_name(store: Store, tenant: str) -> None:
    with pytest.raises(InvalidInputError):
        store.keys.create("k", tenant)


def test_other_tenants_job_is_not_found(engine: Engine, store: Store) -> None:
    acme, other = store.for_tenant("acme"), store.for_tenant("other")
    job_id = create(acme, new_state(sample_size=1, max_iterations=1))
    drive(acme, *claim(store, create(acme)))
    before = rows(engine)
    for other_tenant in (other, store):
        for query in (other_tenant.jobs.get, other_tenant.jobs.state, other_tenant.jobs.cancel):
            with pytest.raises(JobNotFoundError):
                query(job_id)
        assert other_tenant.jobs.events(job_id) == []
        assert other_tenant.jobs.page(limit=9) == []
        assert other_tenant.jobs.page(limit=9, statuses=["queued"]) == []
    assert rows(engine) == before
    assert len(acme.jobs.page(limit=9)) == 2
    assert acme.jobs.get(job_id).tenant == "acme"


def test_workers_serve_every_tenant(store: Store) -> None:
    for tenant in ("acme", "other"):
        assert claim(store, create(store.for_tenant(tenant)))
    create(store.for_tenant("acme"))
    wake_ups = store.maintenance.sweep(renotify_seconds=-1, worker_retention_seconds=60)
    assert len(wake_ups) == 1


def test_job_list_uses_tenant_index(engine: Engine) -> None:
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


def test_other_tenants_job_costs_same_queries_as_unknown_job(engine: Engine, store: Store) -> None:
    job_id = create(store.for_tenant("acme"))
    executed: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _r, statement, *_: executed.append(statement))

    def statements(query: Callable[[str], object], job_id: str) -> list[str]:
        executed.clear()
        with pytest.raises(JobNotFoundError):
            query(job_id)
        return list(executed)

    queries = (
        store.jobs.get,
        store.jobs.state,
        store.jobs.cancel,
        store.jobs.pause,
        store.jobs.resume,
        store.jobs.retry_now,
        store.jobs.delete,
    )
    for query in queries:
        assert statements(query, job_id) == statements(query, "job_" + "0" * 32) != []


def test_other_tenants_resources_cost_same_queries_as_unknown(engine: Engine, store: Store) -> None:
    theirs = store.for_tenant("acme")
    file_id = theirs.files.begin("a", "batch")
    theirs.files.complete(file_id)
    batch_id = theirs.batches.create(
        endpoint="/v1/responses", input_file_id=file_id, window="24h", seconds=9, metadata={}
    ).batch.id
    webhook_id = theirs.webhooks.create("https://example.org", ["job.completed"]).row.id
    executed: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _r, statement, *_: executed.append(statement))

    def statements(query: Callable[[str], object], unknown: str) -> list[str]:
        executed.clear()
        with pytest.raises(NotFoundError):
            query(unknown)
        return list(executed)

    def start(file_id: str) -> object:
        return store.batches.create(
            endpoint="/v1/responses", input_file_id=file_id, window="24h", seconds=9, metadata={}
        )

    queries: list[tuple[str, Callable[[str], object]]] = [
        *((file_id, query) for query in (store.files.get, store.files.delete, start)),
        *((batch_id, query) for query in (store.batches.get, store.batches.cancel, store.batches.delete)),
        *((webhook_id, query) for query in (store.webhooks.get, store.webhooks.delete, store.webhooks.ping)),
        (webhook_id, lambda webhook: store.webhooks.deliveries_page(webhook, limit=9)),
        (webhook_id, lambda webhook: store.webhooks.update(webhook, {"enabled": False})),
        (webhook_id, lambda webhook: store.webhooks.rotate_secret(webhook, 0)),
    ]
    for real, query in queries:
        assert statements(query, real) == statements(query, real[:-4] + "0000") != []


def test_concurrent_key_creation_for_new_tenant(store: Store) -> None:
    made = run_together(*[partial(store.keys.create, f"key {i}", "acme") for i in range(8)])
    assert len({new.secret for new in made}) == 8  # type: ignore[attr-defined]
    assert {key.tenant for key in store.keys.page()} == {"acme"}
