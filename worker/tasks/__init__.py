"""Maintenance tasks: rescue jobs, advance batches, send webhooks, purge old rows."""
