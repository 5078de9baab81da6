"""HTTP API: it reads and writes rows of the database. It loads no model and runs no worker code."""
