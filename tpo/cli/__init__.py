"""The command `tpo`. Each command is a small file that imports heavy modules only when it runs."""

from typing import Annotated

import typer

from tpo import __version__
from tpo.cli.commands.database import database
from tpo.cli.commands.demo import demo
from tpo.cli.commands.doctor import doctor
from tpo.cli.commands.jobs import cancel, delete, extend, jobs, pause, resume, retry, show
from tpo.cli.commands.keys import keys
from tpo.cli.commands.queues import queues
from tpo.cli.commands.run import run
from tpo.cli.commands.settings import settings
from tpo.cli.commands.submit import submit
from tpo.cli.commands.up import up
from tpo.cli.ui.output import Commands

app = typer.Typer(
    name="tpo",
    cls=Commands,
    help="Test-Time Preference Optimization: a model improves its own answers, guided by a reward model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"tpo {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Add the options that `tpo` itself has."""


for command in (run, up, submit, jobs, show, cancel, pause, resume, retry, extend, delete, doctor, settings, demo):
    app.command()(command)
app.add_typer(database, name="db")
app.add_typer(keys, name="keys")
app.add_typer(queues, name="queues")
