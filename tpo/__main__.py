"""Entry point of `python -m tpo`, which is the same as `tpo`."""

from tpo.cli import app

app(prog_name="tpo")
