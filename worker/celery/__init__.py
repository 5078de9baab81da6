"""Everything that tames Celery and Flower."""
