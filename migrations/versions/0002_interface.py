"""Tenants, keys, requests said twice, and what pausing, extending and estimating need to know of a job."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NEW_COLUMNS = (
    "tenant",
    "external_id",
    "fingerprint",
    "source_id",
    "pause_requested_at",
    "progressed_at",
    "call_seconds",
)
OF_JOB = ("events", "calls", "candidates", "iterations")


def upgrade() -> None:
    # Column by column: SQLite's other way, a new table, would lose the triggers that keep what has ended.
    op.add_column("jobs", sa.Column("tenant", sa.String(64), nullable=False, server_default="default"))
    op.add_column("jobs", sa.Column("external_id", sa.String(512)))
    op.add_column("jobs", sa.Column("fingerprint", sa.String(64)))
    op.add_column("jobs", sa.Column("source_id", sa.String(40)))
    op.add_column("jobs", sa.Column("pause_requested_at", sa.Double))
    op.add_column("jobs", sa.Column("progressed_at", sa.Double))
    op.add_column("jobs", sa.Column("call_seconds", sa.Double, nullable=False, server_default="0"))
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "id"])
    op.create_index("jobs_by_tenant_and_status", "jobs", ["tenant", "status", "id"])
    op.create_index("jobs_by_external_id", "jobs", ["tenant", "external_id"], unique=True)
    op.create_index("jobs_by_end", "jobs", ["completed_at"])
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("max_jobs_in_flight", sa.Integer),
        sa.Column("max_jobs_per_minute", sa.Integer),
    )
    op.execute("INSERT INTO tenants (id, created_at) VALUES ('default', 0)")
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(64), sa.ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("revoked_at", sa.Double),
    )
    op.create_index("api_keys_by_hash", "api_keys", ["hash"], unique=True)
    op.create_index("api_keys_by_tenant", "api_keys", ["tenant"])
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"])
    op.create_index("idempotency_keys_by_job", "idempotency_keys", ["job_id"])


def downgrade() -> None:
    for table in ("idempotency_keys", "api_keys", "tenants"):
        op.drop_table(table)
    # The older schema shows every job to everybody: those of other tenants go, rather than become public.
    for table in OF_JOB:
        op.execute(f"DELETE FROM {table} WHERE job_id IN (SELECT id FROM jobs WHERE tenant <> 'default')")  # noqa: S608
    op.execute("DELETE FROM jobs WHERE tenant <> 'default'")
    for index in ("jobs_by_end", "jobs_by_external_id", "jobs_by_tenant_and_status", "jobs_by_tenant"):
        op.drop_index(index, "jobs")
    for column in NEW_COLUMNS:
        op.drop_column("jobs", column)
