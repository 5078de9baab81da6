"""Files in the database, in parts: none is ever loaded whole.

Clients see their tenant's own, and only those that are complete and whose time is not over.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from sqlalchemy import ColumnElement, Select, and_, delete, insert, or_, select, update
from sqlalchemy.orm import Session

from tpo.batches.tables import ENDED, Batch, File, FilePart, Purpose
from tpo.core.errors import ConflictError, UploadNotFoundError
from tpo.db import Queries, new_id, now, reading, writing
from tpo.jobs.quotas import check_stored_bytes
from tpo.tenants.idempotency import IdempotencyRequest, create_idempotently, find_existing, record_key
from tpo.tenants.tenants import Limits

PART_BYTES = 256 * 1024
"""Size of a part, which is one row and one transaction: few parts for a file, short waits for other writers."""

_ABANDONED_SECONDS = 24 * 3600

FILE_IN_USE = "The file {} is read by a batch that has not ended."


class FileQueries(Queries):
    """The part of the store that holds files."""

    def find_existing(self, idempotency: IdempotencyRequest) -> File | None:
        """Return the file that the same request created before. Raises IdempotencyConflictError."""
        with writing(self._engine) as session:
            return _made_before(session, self.tenant, idempotency)

    def begin(self, filename: str, purpose: Purpose, keep_seconds: float | None = None) -> str:
        """Begin a file, which is hidden until it is complete, and return its id."""
        with writing(self._engine) as session:
            _delete_abandoned(session)
            return insert_file(session, self.tenant, filename, purpose, keep_seconds)

    def append_part(self, file_id: str, data: bytes) -> None:
        """Append the next bytes to a file."""
        with writing(self._engine) as session:
            append(session, file_id, data)

    def complete(
        self, file_id: str, idempotency: IdempotencyRequest | None = None, limits: Limits | None = None
    ) -> File:
        """Show a file. If the same request created one in the meantime, discard this one and return that one.

        Raises IdempotencyConflictError and QuotaExceededError.
        """

        def complete(session: Session) -> File:
            if known := _made_before(session, self.tenant, idempotency):
                session.execute(delete(File).where(File.id == file_id))
                return known
            if limits:
                check_stored_bytes(session, self.tenant, limits)
            session.execute(update(File).where(File.id == file_id).values(complete=True))
            record_key(session, self.tenant, idempotency, file_id=file_id)
            return session.get_one(File, file_id)

        return create_idempotently(self._engine, complete)

    def discard(self, file_id: str) -> None:
        """Delete a file that was not completed."""
        with writing(self._engine) as session:
            session.execute(delete(File).where(File.id == file_id, File.complete.is_(False)))

    def get(self, file_id: str) -> File:
        """Return one file. Raises UploadNotFoundError."""
        with reading(self._engine) as session:
            return own_file(session, self.tenant, file_id)

    def page(
        self,
        *,
        limit: int,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
        purpose: Purpose | None = None,
    ) -> Sequence[File]:
        """Return a page of files by age. `after` is the last id of the previous page."""
        query = select(File).where(File.tenant == self.tenant, _is_there())
        if after is not None:
            query = query.where(File.id > after if order == "asc" else File.id < after)
        if purpose is not None:
            query = query.where(File.purpose == purpose)
        with reading(self._engine) as session:
            return session.scalars(query.order_by(File.id if order == "asc" else File.id.desc()).limit(limit)).all()

    def content(self, file_id: str, offset: int = 0) -> Iterator[bytes]:
        """Iterate over the bytes of a file from an offset on. Each part is read when it is needed."""
        while True:
            with reading(self._engine) as session:
                part = session.scalars(
                    select(FilePart)
                    .where(FilePart.file_id == file_id, FilePart.start <= offset)
                    .order_by(FilePart.start.desc())
                    .limit(1)
                ).one_or_none()
            data = part.data[offset - part.start :] if part else b""
            if not data:
                return
            yield data
            offset += len(data)

    def delete(self, file_id: str) -> None:
        """Delete a file and its content. Raises UploadNotFoundError, and ConflictError while a batch reads it."""
        with writing(self._engine) as session:
            own_file(session, self.tenant, file_id)
            if session.scalars(_read_now().where(Batch.input_file_id == file_id).limit(1)).one_or_none() is not None:
                raise ConflictError(FILE_IN_USE.format(file_id))
            session.execute(delete(File).where(File.id == file_id))

    def purge(self, retention_seconds: float | None, limit: int = 10) -> int:
        """Delete some expired files of all tenants, except those that a batch still reads. Returns how many."""
        over = File.expires_at < now()
        if retention_seconds is not None:
            over = or_(over, File.created_at < now() - retention_seconds)
        which = select(File.id).where(over, File.complete, File.id.not_in(_read_now()))
        with writing(self._engine) as session:
            ids = session.scalars(which.limit(limit).with_for_update(skip_locked=True)).all()
            session.execute(delete(File).where(File.id.in_(ids)))
            return len(ids)


def own_file(session: Session, tenant: str, file_id: str) -> File:
    """Return a complete file of a tenant. Raises UploadNotFoundError."""
    query = select(File).where(File.id == file_id, File.tenant == tenant, _is_there())
    found = session.scalars(query).one_or_none()
    if found is None:
        raise UploadNotFoundError(f"There is no file {file_id!r}.")
    return found


def insert_file(
    session: Session, tenant: str, filename: str, purpose: Purpose, keep_seconds: float | None = None
) -> str:
    """Insert the row of an empty file and return its id."""
    seconds = session.execute(select(now())).scalar_one()
    file_id = new_id("file-", seconds)
    session.execute(
        insert(File).values(
            id=file_id,
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=0,
            complete=False,
            created_at=now(),
            expires_at=None if keep_seconds is None else now() + keep_seconds,
        )
    )
    return file_id


def append(session: Session, file_id: str, data: bytes) -> None:
    """Insert the next part of a file."""
    longer = update(File).where(File.id == file_id).values(bytes=File.bytes + len(data)).returning(File.bytes)
    size = session.execute(longer).scalar_one()
    session.execute(insert(FilePart).values(file_id=file_id, start=size - len(data), data=data))


def _is_there() -> ColumnElement[bool]:
    return and_(File.complete, or_(File.expires_at.is_(None), File.expires_at > now()))


def _read_now() -> Select[str]:
    """Match files that batches still read."""
    return select(Batch.input_file_id).where(Batch.status.not_in(ENDED))


def _made_before(session: Session, tenant: str, idempotency: IdempotencyRequest | None) -> File | None:
    known = find_existing(session, tenant, idempotency)
    return session.get_one(File, known.file_id) if known else None


def _delete_abandoned(session: Session) -> None:
    """Delete uploads whose process died before they were complete."""
    old = (File.complete.is_(False), File.purpose == "batch", File.created_at < now() - _ABANDONED_SECONDS)
    session.execute(delete(File).where(*old))
