"""Whose turn it is: priorities, the line of waiting jobs, turns, limits of running jobs, and queues that are paused."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Column by column: SQLite's other way, a new table, would lose the triggers that keep what has ended.
    op.add_column("jobs", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("tenants", sa.Column("max_jobs_running", sa.Integer))
    op.drop_index("jobs_by_bell", "jobs")
    line = ["model", "reward_model", "tenant", "priority", "id"]
    _partial("jobs_in_line", line, "status = 'queued' AND next_attempt_at IS NULL")
    _partial("jobs_running", ["model", "reward_model", "tenant"], "status IN ('in_progress', 'cancelling')")
    _partial("jobs_by_next_attempt", ["status", "next_attempt_at"], "status = 'queued' AND next_attempt_at IS NOT NULL")
    op.create_table(
        "queues",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("paused_at", sa.Double),
    )
    op.create_table(
        "turns",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("reward_model", sa.Text, primary_key=True),
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("priority", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("served_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("turns")
    op.drop_table("queues")
    for index in ("jobs_by_next_attempt", "jobs_running", "jobs_in_line"):
        op.drop_index(index, "jobs")
    op.create_index("jobs_by_bell", "jobs", ["status", "rung_at"])
    op.drop_column("tenants", "max_jobs_running")
    op.drop_column("jobs", "priority")


def _partial(name: str, columns: list[str], where: str) -> None:
    op.create_index(name, "jobs", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
