"""The processes that do the work: one job worker a GPU, and one for maintenance. Celery here and nowhere else."""
