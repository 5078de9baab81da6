"""Entry point of `python -m tpo.cli`, which is the same as `tpo`."""

from tpo.cli import app

app()
