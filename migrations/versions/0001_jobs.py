"""Jobs, what is recorded of each, the workers, and the database's own refusal to change what has ended."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Spelled out and not imported: a migration stays what it was when the code moves on.
TERMINAL = "('completed', 'failed', 'cancelled', 'expired', 'incomplete')"
RECORD = ("iterations", "candidates", "calls")


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("reward_model", sa.Text, nullable=False),
        sa.Column("input", sa.JSON, nullable=False),
        sa.Column("params", sa.JSON, nullable=False),
        sa.Column("prompts", sa.JSON, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.Column("cancel_requested_at", sa.Double),
        sa.Column("deadline_at", sa.Double),
        sa.Column("next_attempt_at", sa.Double),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("attempts_in_vain", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.Double),
        sa.Column("rung_at", sa.Double, nullable=False),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("phase", sa.Text),
        sa.Column("best_candidate", sa.Text),
        sa.Column("best_reward", sa.Double),
        sa.Column("input_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("reward_tokens", sa.Integer, nullable=False),
        sa.Column("last_event", sa.Integer, nullable=False),
        sa.Column("output", sa.Text),
        sa.Column("error_code", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("incomplete_reason", sa.Text),
        sa.CheckConstraint(
            "status IN ('queued', 'in_progress', 'paused', 'cancelling',"
            " 'completed', 'failed', 'cancelled', 'expired', 'incomplete')",
            name="jobs_status",
        ),
    )
    op.create_index("jobs_by_status", "jobs", ["status", "id"])
    op.create_index("jobs_by_bell", "jobs", ["status", "rung_at"])
    op.create_index("jobs_by_deadline", "jobs", ["status", "deadline_at"])
    op.create_table(
        "iterations",
        _of_job(),
        _number("number"),
        sa.Column("chosen", sa.Text, nullable=False),
        sa.Column("rejected", sa.Text),
        sa.Column("loss", sa.Text),
        sa.Column("loss_attempt", sa.Integer, nullable=False),
        sa.Column("gradient", sa.Text),
        sa.Column("gradient_attempt", sa.Integer, nullable=False),
    )
    op.create_table(
        "candidates",
        _of_job(),
        _number("iteration"),
        _number("sample"),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("reward", sa.Double),
        sa.Column("unusable", sa.Text),
    )
    op.create_table(
        "calls",
        _of_job(),
        _number("number"),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("input_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
    )
    op.create_table(
        "events",
        _of_job(),
        _number("number"),
        sa.Column("type", sa.String(40), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("reward_model", sa.Text, nullable=False),
        sa.Column("slots", sa.Integer, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":
        _refuse_on_sqlite()
    else:
        _refuse_on_postgresql()


def downgrade() -> None:
    for table in ("workers", "events", "calls", "candidates", "iterations", "jobs"):
        op.drop_table(table)  # and its indexes and triggers with it
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_new_status()")
        op.execute("DROP FUNCTION refuse_late_record()")


def _of_job() -> sa.Column[str]:
    return sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, primary_key=True, autoincrement=False)


def _refuse_on_sqlite() -> None:
    op.execute(
        f"""
        CREATE TRIGGER jobs_end_once BEFORE UPDATE OF status ON jobs
        WHEN OLD.status IN {TERMINAL} AND NEW.status IS NOT OLD.status
        BEGIN SELECT RAISE(ABORT, 'a terminal status never changes'); END
        """
    )
    for table in RECORD:
        op.execute(
            f"""
            CREATE TRIGGER {table}_before_the_end BEFORE INSERT ON {table}
            WHEN (SELECT status FROM jobs WHERE id = NEW.job_id) IN {TERMINAL}
            BEGIN SELECT RAISE(ABORT, 'nothing is recorded of a job that has ended'); END
            """  # noqa: S608
        )


def _refuse_on_postgresql() -> None:
    op.execute(
        """
        CREATE FUNCTION refuse_new_status() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'a terminal status never changes' USING ERRCODE = 'integrity_constraint_violation';
        END $$
        """
    )
    op.execute(
        f"""
        CREATE TRIGGER jobs_end_once BEFORE UPDATE OF status ON jobs FOR EACH ROW
        WHEN (OLD.status IN {TERMINAL} AND NEW.status IS DISTINCT FROM OLD.status)
        EXECUTE FUNCTION refuse_new_status()
        """
    )
    op.execute(
        f"""
        CREATE FUNCTION refuse_late_record() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF (SELECT status FROM jobs WHERE id = NEW.job_id) IN {TERMINAL} THEN
                RAISE EXCEPTION 'nothing is recorded of a job that has ended'
                    USING ERRCODE = 'integrity_constraint_violation';
            END IF;
            RETURN NEW;
        END $$
        """  # noqa: S608
    )
    for table in RECORD:
        op.execute(
            f"""
            CREATE TRIGGER {table}_before_the_end BEFORE INSERT ON {table} FOR EACH ROW
            EXECUTE FUNCTION refuse_late_record()
            """
        )
