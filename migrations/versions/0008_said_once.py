"""Requests for files and batches that are said twice; when files go."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("idempotency_keys") as table:
        table.alter_column("job_id", existing_type=sa.String(40), nullable=True)
        for made in ("file", "batch"):
            table.add_column(sa.Column(f"{made}_id", sa.String(40)))
            name, to = f"idempotency_keys_{made}", _TABLES[made]
            table.create_foreign_key(name, to, [f"{made}_id"], ["id"], ondelete="CASCADE")
            table.create_index(f"idempotency_keys_by_{made}", [f"{made}_id"])
    op.add_column("files", sa.Column("expires_at", sa.Double))
    op.create_index("files_by_end", "files", ["expires_at"])
    op.create_index("files_by_age", "files", ["created_at"])
    op.add_column("batches", sa.Column("output_seconds", sa.Double))
    op.create_index("batches_by_end", "batches", ["ended_at"])


def downgrade() -> None:
    op.drop_index("batches_by_end", "batches")
    op.drop_column("batches", "output_seconds")
    for index in ("files_by_age", "files_by_end"):
        op.drop_index(index, "files")
    op.drop_column("files", "expires_at")
    op.execute("DELETE FROM idempotency_keys WHERE job_id IS NULL")
    with op.batch_alter_table("idempotency_keys") as table:
        for made in ("batch", "file"):
            table.drop_index(f"idempotency_keys_by_{made}")
            table.drop_constraint(f"idempotency_keys_{made}", type_="foreignkey")
            table.drop_column(f"{made}_id")
        table.alter_column("job_id", existing_type=sa.String(40), nullable=False)


_TABLES = {"file": "files", "batch": "batches"}
