"""Alembic migrations of the database schema. `tpo.db.schema` runs them; the tests build every database with them."""
