"""The schema's history, for Alembic. `tpo.db.schema` runs it; the tests build every database with it."""
