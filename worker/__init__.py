"""Worker processes: one job worker per GPU, and one for maintenance. Only this package imports Celery's worker."""
