"""Jobs in SQL: submission, claims, scheduling, checkpoints, lifecycle, maintenance and events."""
