"""The command `tpo`: what people type. Each command is a small file that imports what it needs when it runs."""

import typer

from tpo.cli.database import database
from tpo.cli.demo import demo
from tpo.cli.doctor import doctor
from tpo.cli.jobs import cancel, delete, extend, jobs, pause, resume, retry, show
from tpo.cli.keys import keys
from tpo.cli.output import Commands
from tpo.cli.queues import queues
from tpo.cli.run import run
from tpo.cli.submit import submit
from tpo.cli.up import up

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
