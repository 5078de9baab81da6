"""Deletion and retention of files and batches, on both databases."""

import pytest
from sqlalchemy import Engine, select, update

from testing.jobs import execute, rows
from tpo.batches.advance import end_batch
from tpo.batches.files import append, insert_file
from tpo.batches.tables import Batch, File, FilePart
from tpo.core.errors import BatchNotFoundError, UploadNotFoundError
from tpo.db import reading, writing
from tpo.settings import Settings
from tpo.store import Store
from worker.tasks.cleaner import Cleaner

DAY = 24 * 3600.0


def upload(store: Store, keep_seconds: float | None = None) -> str:
    """Upload a file and return its id."""
    file_id = store.files.begin("a", "batch", keep_seconds)
    store.files.append_part(file_id, b"x")
    return store.files.complete(file_id).id


def new_batch(store: Store, file_id: str) -> Batch:
    """Create a batch from an input file."""
    return store.batches.create(
        endpoint="/v1/responses", input_file_id=file_id, window="24h", seconds=DAY, metadata={}
    ).batch


def ended_batch(engine: Engine, store: Store, file_id: str) -> Batch:
    """Create a batch that has ended and has an output file."""
    batch = new_batch(store, file_id)
    with writing(engine) as session:
        output = insert_file(session, store.tenant, "output", "batch_output")
        append(session, output, b"y")
        session.execute(update(File).where(File.id == output).values(complete=True))
        session.execute(update(Batch).where(Batch.id == batch.id).values(output_file_id=output))
        end_batch(session, batch, "failed", {"error_code": "empty_file"})
    return store.batches.get(batch.id)


def ids(engine: Engine) -> tuple[set[str], set[str], set[str]]:
    """Return the ids of files, of files that have parts, and of batches."""
    with reading(engine) as session:
        files, parts, batches = (select(column) for column in (File.id, FilePart.file_id, Batch.id))
        return set(session.scalars(files)), set(session.scalars(parts)), set(session.scalars(batches))


def test_cleaner_removes_expired_files_and_batches(engine: Engine, store: Store) -> None:
    old_input, young, read_now, expired = (upload(store) for _ in range(4))
    old = ended_batch(engine, store, old_input)
    working = new_batch(store, read_now)
    other_tenants = upload(store.for_tenant("acme"))
    unfinished = store.files.begin("a", "batch")
    aged = (old_input, read_now, other_tenants, unfinished)
    execute(engine, f"UPDATE files SET created_at = created_at - {31 * DAY} WHERE id IN {aged}")
    execute(engine, f"UPDATE batches SET ended_at = ended_at - {31 * DAY} WHERE id = '{old.id}'")
    execute(engine, f"UPDATE files SET expires_at = created_at - 1 WHERE id = '{expired}'")

    Cleaner(Settings(retention_days=None), store).purge()
    assert ids(engine)[0] == {old_input, old.output_file_id, young, read_now, other_tenants, unfinished}

    Cleaner(Settings(retention_days=30), store).purge()
    files, parts, batches = ids(engine)
    assert files == {young, read_now, unfinished}  # a batch still reads one; the upload of another is incomplete
    assert parts == {young, read_now}
    assert batches == {working.id}
    before = rows(engine)
    Cleaner(Settings(retention_days=30), store).purge()
    assert rows(engine) == before


def test_batch_is_deleted_by_owner_only(engine: Engine, store: Store) -> None:
    batch = ended_batch(engine, store, upload(store))
    with pytest.raises(BatchNotFoundError):
        store.for_tenant("acme").batches.delete(batch.id)
    assert batch.output_file_id
    assert store.files.get(batch.output_file_id)
    store.batches.delete(batch.id)
    with pytest.raises(UploadNotFoundError):
        store.files.get(batch.output_file_id)
    assert ids(engine)[2] == set()
