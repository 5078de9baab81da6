"""The HTTP API: HTTP in, rows out. It loads no model and runs no worker code."""
