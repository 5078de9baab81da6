"""The schema's history, for Alembic. `tpo.jobs.schema` runs it; the tests build every database with it."""
