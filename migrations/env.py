"""Alembic's environment: run the migrations on the connection of `tpo.db.schema`, in one transaction per upgrade."""

from alembic import context

from tpo.db import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite cannot alter a column in place
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
