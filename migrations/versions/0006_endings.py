"""Why a job was given up before its last iteration, and where its rewards fell."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Column by column: SQLite's other way, a new table, would lose the triggers that keep what has ended.
    op.add_column("jobs", sa.Column("stop_reason", sa.Text))
    op.add_column("jobs", sa.Column("declined_iteration", sa.Integer))


def downgrade() -> None:
    for column in ("stop_reason", "declined_iteration"):
        op.drop_column("jobs", column)
