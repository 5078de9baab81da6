"""What a candidate's reward is the sum of."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("candidates", sa.Column("parts", sa.JSON))


def downgrade() -> None:
    # Not as a batch: SQLite would build the table anew, without the triggers that guard it.
    op.drop_column("candidates", "parts")
