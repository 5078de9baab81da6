"""What keeps a store of millions of jobs as quick as a small one: metadata as rows, and the indexes that lacked."""

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_BATCH = 1000


def upgrade() -> None:
    op.create_table(
        "job_metadata",
        sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(512), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
    )
    rows = sa.table("job_metadata", *(sa.column(name) for name in ("job_id", "key", "value", "tenant")))
    for pairs in _pairs():
        op.bulk_insert(rows, pairs)
    op.create_index("job_metadata_by_pair", "job_metadata", ["tenant", "key", "value", "job_id"])
    op.create_index(
        "files_incomplete",
        "files",
        ["created_at"],
        sqlite_where=sa.text("complete IS 0"),
        postgresql_where=sa.text("complete IS false"),
    )
    op.drop_index("jobs_by_deadline", "jobs")
    op.create_index(
        "jobs_by_deadline",
        "jobs",
        ["status", "deadline_at"],
        sqlite_where=sa.text("deadline_at IS NOT NULL"),
        postgresql_where=sa.text("deadline_at IS NOT NULL"),
    )
    op.create_index("batches_by_input_file", "batches", ["input_file_id"])
    op.create_index("deliveries_of_webhook", "deliveries", ["webhook_id", "id"])


def downgrade() -> None:
    op.drop_index("deliveries_of_webhook", "deliveries")
    op.drop_index("batches_by_input_file", "batches")
    op.drop_index("jobs_by_deadline", "jobs")
    op.create_index("jobs_by_deadline", "jobs", ["status", "deadline_at"])
    op.drop_index("files_incomplete", "files")
    op.drop_table("job_metadata")


def _pairs() -> Iterator[list[dict[str, str]]]:
    """The metadata of all jobs, some jobs at a time."""
    jobs = sa.table("jobs", *(sa.column(name) for name in ("id", "tenant")), sa.column("metadata", sa.JSON))
    last = ""
    while True:
        query = sa.select(jobs).where(jobs.c.id > last).order_by(jobs.c.id).limit(_BATCH)
        found = op.get_bind().execute(query).all()
        if not found:
            return
        last = found[-1].id
        pairs = [
            {"job_id": job.id, "key": key, "value": value, "tenant": job.tenant}
            for job in found
            for key, value in job.metadata.items()
        ]
        if pairs:
            yield pairs
