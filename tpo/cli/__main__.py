"""`python -m tpo.cli` is `tpo`."""

from tpo.cli import app

app()
