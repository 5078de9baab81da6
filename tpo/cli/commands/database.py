"""`tpo db`: the schema of the database in TPO_DATABASE_URL."""

from typing import Annotated

import typer

from tpo.cli.ui.output import Commands, console, print_json

database = typer.Typer(cls=Commands, help="The schema of the database in TPO_DATABASE_URL.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@database.command("upgrade")
def upgrade(as_json: AsJson = False) -> None:
    """Bring the schema up to this version. Safe to repeat; keeps all data."""
    from tpo.cli.environment import read_settings
    from tpo.db import schema

    schema.upgrade(read_settings().database_url.get_secret_value())
    _say("the database has the schema of this version", as_json)


@database.command("check")
def check(as_json: AsJson = False) -> None:
    """Say whether the schema fits this version; exit 1 where it does not."""
    from tpo.cli.environment import read_settings
    from tpo.db import connect, schema

    engine = connect(read_settings().database_url.get_secret_value())
    try:
        schema.check(engine)
    finally:
        engine.dispose()
    _say("the database has the schema of this version", as_json)


def _say(message: str, as_json: bool) -> None:
    if as_json:
        print_json({"ok": True, "message": message})
    else:
        console().print(message)
