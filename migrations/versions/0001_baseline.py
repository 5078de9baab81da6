"""The schema of the first release."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Literals instead of imports: a migration must not change when the code does.
TERMINAL = "('completed', 'failed', 'cancelled', 'expired', 'incomplete')"
RECORD = ("iterations", "candidates", "calls")


def upgrade() -> None:
    """Create all tables, indexes and triggers."""
    op.create_table(
        "batches",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file_id", sa.String(40), nullable=False),
        sa.Column("output_file_id", sa.String(40)),
        sa.Column("error_file_id", sa.String(40)),
        sa.Column("completion_window", sa.String(16), nullable=False),
        sa.Column("output_seconds", sa.Double),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("in_progress_at", sa.Double),
        sa.Column("finalizing_at", sa.Double),
        sa.Column("cancelling_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sa.Column("advanced_at", sa.Double, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("line", sa.Integer, nullable=False),
        sa.Column("written", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("completed", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("batches_by_end", "batches", ["ended_at"])
    op.create_index("batches_by_input_file", "batches", ["input_file_id"])
    op.create_index("batches_by_status", "batches", ["status", "advanced_at"])
    op.create_index("batches_by_tenant", "batches", ["tenant", "id"])
    op.create_table(
        "files",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("complete", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("files_by_age", "files", ["created_at"])
    op.create_index("files_by_end", "files", ["expires_at"])
    op.create_index("files_by_tenant", "files", ["tenant", "id"])
    op.create_index(
        "files_incomplete",
        "files",
        ["created_at"],
        sqlite_where=sa.text("complete IS 0"),
        postgresql_where=sa.text("complete IS false"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("external_id", sa.String(512)),
        sa.Column("fingerprint", sa.String(64)),
        sa.Column("source_id", sa.String(40)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("reward_model", sa.Text, nullable=False),
        sa.Column("input", sa.JSON, nullable=False),
        sa.Column("input_preview", sa.String(200), nullable=False),
        sa.Column("input_bytes", sa.Integer, nullable=False),
        sa.Column("params", sa.JSON, nullable=False),
        sa.Column("prompts", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.Column("cancel_requested_at", sa.Double),
        sa.Column("pause_requested_at", sa.Double),
        sa.Column("progressed_at", sa.Double),
        sa.Column("deadline_at", sa.Double),
        sa.Column("next_attempt_at", sa.Double),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("consecutive_failures", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.Double),
        sa.Column("lost_together", sa.Boolean, nullable=False),
        sa.Column("quarantine", sa.String(16)),
        sa.Column("lost_with", sa.Text),
        sa.Column("queued_at", sa.Double, nullable=False),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("phase", sa.Text),
        sa.Column("best_candidate", sa.Text),
        sa.Column("best_reward", sa.Double),
        sa.Column("declined_iteration", sa.Integer),
        sa.Column("input_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("reward_tokens", sa.Integer, nullable=False),
        sa.Column("model_seconds", sa.Double, nullable=False),
        sa.Column("last_event", sa.Integer, nullable=False),
        sa.Column("output", sa.Text),
        sa.Column("error_code", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("incomplete_reason", sa.Text),
        sa.Column("stop_reason", sa.Text),
        sa.CheckConstraint(
            "status IN ('queued', 'in_progress', 'paused', 'cancelling',"
            " 'completed', 'failed', 'cancelled', 'expired', 'incomplete')",
            name="jobs_status",
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "jobs_by_deadline",
        "jobs",
        ["status", "deadline_at"],
        sqlite_where=sa.text("deadline_at IS NOT NULL"),
        postgresql_where=sa.text("deadline_at IS NOT NULL"),
    )
    op.create_index("jobs_by_end", "jobs", ["completed_at"])
    op.create_index("jobs_by_external_id", "jobs", ["tenant", "external_id"], unique=True)
    op.create_index(
        "jobs_by_next_attempt",
        "jobs",
        ["status", "next_attempt_at"],
        sqlite_where=sa.text("status = 'queued' AND next_attempt_at IS NOT NULL"),
        postgresql_where=sa.text("status = 'queued' AND next_attempt_at IS NOT NULL"),
    )
    op.create_index("jobs_by_status", "jobs", ["status", "id"])
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "id"])
    op.create_index("jobs_by_stored_bytes", "jobs", ["tenant", "input_bytes"])
    op.create_index("jobs_by_tenant_and_status", "jobs", ["tenant", "status", "id"])
    op.create_index(
        "jobs_in_line",
        "jobs",
        ["model", "reward_model", "tenant", "priority", "id"],
        sqlite_where=sa.text("status = 'queued' AND next_attempt_at IS NULL AND quarantine IS NULL"),
        postgresql_where=sa.text("status = 'queued' AND next_attempt_at IS NULL AND quarantine IS NULL"),
    )
    op.create_index(
        "jobs_in_quarantine",
        "jobs",
        ["model", "reward_model", "queued_at", "id"],
        sqlite_where=sa.text("quarantine IS NOT NULL"),
        postgresql_where=sa.text("quarantine IS NOT NULL"),
    )
    op.create_index(
        "jobs_running",
        "jobs",
        ["model", "reward_model", "tenant"],
        sqlite_where=sa.text("status IN ('in_progress', 'cancelling')"),
        postgresql_where=sa.text("status IN ('in_progress', 'cancelling')"),
    )
    op.create_table(
        "last_claims",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("reward_model", sa.Text, nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("priority", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("claimed_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("model", "reward_model", "tenant", "priority"),
    )
    op.create_table(
        "queues",
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("paused_at", sa.Double),
        sa.PrimaryKeyConstraint("model"),
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("max_jobs_in_flight", sa.Integer),
        sa.Column("max_jobs_per_minute", sa.Integer),
        sa.Column("max_jobs_running", sa.Integer),
        sa.Column("max_stored_bytes", sa.BigInteger),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("events", sa.JSON, nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("disabled_reason", sa.Text),
        sa.Column("secret", sa.Text, nullable=False),
        sa.Column("old_secret", sa.Text),
        sa.Column("old_secret_until", sa.Double),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("webhooks_by_tenant", "webhooks", ["tenant", "id"])
    op.create_table(
        "workers",
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("reward_model", sa.Text, nullable=False),
        sa.Column("concurrency", sa.Integer, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("api_keys_by_hash", "api_keys", ["hash"], unique=True)
    op.create_index("api_keys_by_tenant", "api_keys", ["tenant"])
    op.create_table(
        "batch_lines",
        sa.Column("batch_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("custom_id", sa.Text),
        sa.Column("job_id", sa.String(40)),
        sa.Column("settled", sa.Boolean, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("error_param", sa.Text),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("batch_id", "number"),
    )
    op.create_index("batch_lines_by_custom_id", "batch_lines", ["batch_id", "custom_id"])
    op.create_index("batch_lines_by_settled", "batch_lines", ["batch_id", "settled"])
    op.create_table(
        "calls",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("iteration", sa.Integer, nullable=False),
        sa.Column("n", sa.Integer, nullable=False),
        sa.Column("input_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number"),
    )
    op.create_table(
        "candidates",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("iteration", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("sample", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("reward", sa.Double),
        sa.Column("unusable", sa.Text),
        sa.Column("parts", sa.JSON(none_as_null=True)),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "iteration", "sample"),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("webhook_id", sa.String(40), nullable=False),
        sa.Column("event_id", sa.String(40), nullable=False),
        sa.Column("type", sa.String(40), nullable=False),
        sa.Column("object_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("next_attempt_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.Column("last_error", sa.Text),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhooks.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("deliveries_by_end", "deliveries", ["ended_at"])
    op.create_index("deliveries_by_time", "deliveries", ["status", "next_attempt_at"])
    op.create_index("deliveries_by_webhook", "deliveries", ["webhook_id", "status", "next_attempt_at"])
    op.create_index("deliveries_of_webhook", "deliveries", ["webhook_id", "id"])
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("type", sa.String(40), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number"),
    )
    op.create_table(
        "file_parts",
        sa.Column("file_id", sa.String(40), nullable=False),
        sa.Column("start", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("file_id", "start"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(40)),
        sa.Column("file_id", sa.String(40)),
        sa.Column("batch_id", sa.String(40)),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tenant", "key"),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"])
    op.create_index("idempotency_keys_by_batch", "idempotency_keys", ["batch_id"])
    op.create_index("idempotency_keys_by_file", "idempotency_keys", ["file_id"])
    op.create_index("idempotency_keys_by_job", "idempotency_keys", ["job_id"])
    op.create_table(
        "iterations",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("chosen", sa.Text, nullable=False),
        sa.Column("rejected", sa.Text),
        sa.Column("critique", sa.Text),
        sa.Column("critique_attempt", sa.Integer, nullable=False),
        sa.Column("gradient", sa.Text),
        sa.Column("gradient_attempt", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number"),
    )
    op.create_table(
        "job_metadata",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.String(512), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key"),
    )
    op.create_index("job_metadata_by_pair", "job_metadata", ["tenant", "key", "value", "job_id"])
    op.execute("INSERT INTO tenants (id, created_at) VALUES ('default', 0)")
    if op.get_bind().dialect.name == "sqlite":
        _refuse_on_sqlite()
    else:
        _refuse_on_postgresql()


def downgrade() -> None:
    """Drop everything that `upgrade` creates."""
    for table in (
        "job_metadata",
        "iterations",
        "idempotency_keys",
        "file_parts",
        "events",
        "deliveries",
        "candidates",
        "calls",
        "batch_lines",
        "api_keys",
        "workers",
        "webhooks",
        "tenants",
        "queues",
        "last_claims",
        "jobs",
        "files",
        "batches",
    ):
        op.drop_table(table)  # this also drops its indexes and triggers
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_new_status()")
        op.execute("DROP FUNCTION refuse_late_record()")


def _refuse_on_sqlite() -> None:
    """Create triggers that refuse to change a terminal status and to add records to a terminal job."""
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
    """Create triggers that refuse to change a terminal status and to add records to a terminal job."""
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
