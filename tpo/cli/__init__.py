"""The command `tpo`: what people type. Each command is a small file that imports what it needs when it runs."""

import typer

from tpo.cli.commands.database import database
from tpo.cli.commands.demo import demo
from tpo.cli.commands.doctor import doctor
from tpo.cli.commands.jobs import cancel, delete, extend, jobs, pause, resume, retry, show
from tpo.cli.commands.keys import keys
from tpo.cli.commands.queues import queues
from tpo.cli.commands.run import run
from tpo.cli.commands.submit import submit
from tpo.cli.commands.up import up
from tpo.cli.ui.output import Commands

app = typer.Typer(
    name="tpo",
    cls=Commands,
    help="Test-Time Preference Optimization: a model improves its own answer under a reward model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run, up, submit, jobs, show, cancel, pause, resume, retry, extend, delete, doctor, demo):
    app.command()(command)
app.add_typer(database, name="db")
app.add_typer(keys, name="keys")
app.add_typer(queues, name="queues")
