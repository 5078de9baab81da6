"""Batches of a tenant: create, read, cancel and delete them."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import and_, case, delete, insert, select, update
from sqlalchemy.orm import Session

from tpo.batches.files import own_file
from tpo.batches.tables import ENDED, Batch, File
from tpo.core.errors import BatchNotFoundError, InvalidInputError, WrongStateError
from tpo.db import Queries, new_id, now, reading, writing
from tpo.tenants.idempotency import IdempotencyRequest, create_idempotently, find_existing, record_key

BATCH_NOT_ENDED = "The batch {} has not ended. Cancel it first."


class NewBatch(NamedTuple):
    """A requested batch, and whether it is new."""

    batch: Batch
    new: bool


class BatchQueries(Queries):
    """The part of the store that holds a tenant's batches."""

    def create(
        self,
        *,
        endpoint: str,
        input_file_id: str,
        window: str,
        seconds: float,
        metadata: dict[str, str],
        output_seconds: float | None = None,
        idempotency: IdempotencyRequest | None = None,
    ) -> NewBatch:
        """Commit a new batch, or return the one that the same request created before.

        Raises UploadNotFoundError, IdempotencyConflictError, InvalidInputError if the file is not for batches.
        """

        def create(session: Session) -> NewBatch:
            if known := find_existing(session, self.tenant, idempotency):
                return NewBatch(session.get_one(Batch, known.batch_id), new=False)
            if own_file(session, self.tenant, input_file_id).purpose != "batch":
                raise InvalidInputError("input_file_id: the file's purpose must be batch.", "input_file_id")
            batch_id = new_id("batch_", session.execute(select(now())).scalar_one())
            session.execute(
                insert(Batch).values(
                    id=batch_id,
                    tenant=self.tenant,
                    endpoint=endpoint,
                    input_file_id=input_file_id,
                    completion_window=window,
                    batch_metadata=metadata,
                    output_seconds=output_seconds,
                    created_at=now(),
                    expires_at=now() + seconds,
                    advanced_at=now(),
                )
            )
            record_key(session, self.tenant, idempotency, batch_id=batch_id)
            return NewBatch(session.get_one(Batch, batch_id), new=True)

        return create_idempotently(self._engine, create)

    def get(self, batch_id: str) -> Batch:
        """Return one batch. Raises BatchNotFoundError."""
        with reading(self._engine) as session:
            return self._own_batch(session, batch_id)

    def page(self, *, limit: int, after: str | None = None) -> Sequence[Batch]:
        """Return a page of batches, the newest first. `after` is the last id of the previous page."""
        query = select(Batch).where(Batch.tenant == self.tenant)
        if after is not None:
            query = query.where(Batch.id < after)
        with reading(self._engine) as session:
            return session.scalars(query.order_by(Batch.id.desc()).limit(limit)).all()

    def cancel(self, batch_id: str) -> Batch:
        """Cancel a batch; one that has nothing left to do is not changed. Raises BatchNotFoundError."""
        with writing(self._engine) as session:
            self._own_batch(session, batch_id)
            which = and_(Batch.id == batch_id, Batch.status.in_(("validating", "in_progress")))
            # While its requests are counted, its position is that of the count; then it is read from the start.
            counting = Batch.status == "validating"
            restart = {name: case((counting, 0), else_=getattr(Batch, name)) for name in ("offset", "line", "total")}
            session.execute(update(Batch).where(which).values(status="cancelling", cancelling_at=now(), **restart))
            return self._own_batch(session, batch_id)

    def delete(self, batch_id: str) -> None:
        """Delete an ended batch with its output and errors. Raises BatchNotFoundError, WrongStateError."""
        with writing(self._engine) as session:
            batch = self._own_batch(session, batch_id)
            if batch.status not in ENDED:
                raise WrongStateError(BATCH_NOT_ENDED.format(batch_id))
            _delete(session, [batch])

    def purge(self, retention_seconds: float, limit: int = 5) -> int:
        """Delete some batches of all tenants that ended before the retention period. Returns how many."""
        over = select(Batch).where(Batch.ended_at < now() - retention_seconds).order_by(Batch.ended_at)
        with writing(self._engine) as session:
            batches = session.scalars(over.limit(limit).with_for_update(skip_locked=True)).all()
            _delete(session, batches)
            return len(batches)

    def _own_batch(self, session: Session, batch_id: str) -> Batch:
        query = select(Batch).where(Batch.id == batch_id, Batch.tenant == self.tenant)
        batch = session.scalars(query.execution_options(populate_existing=True)).one_or_none()
        if batch is None:
            raise BatchNotFoundError(f"There is no batch {batch_id!r}.")
        return batch


def _delete(session: Session, batches: Sequence[Batch]) -> None:
    files = [name for batch in batches for name in (batch.output_file_id, batch.error_file_id) if name]
    session.execute(delete(File).where(File.id.in_(files)))
    session.execute(delete(Batch).where(Batch.id.in_([batch.id for batch in batches])))
