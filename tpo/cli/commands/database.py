"""`tpo db`: the schema of the database in TPO_DATABASE_URL."""

from typing import Annotated

import typer

from tpo.cli.ui.output import Commands, console, print_json

database = typer.Typer(
    cls=Commands, help="Upgrade or check the schema of the database in TPO_DATABASE_URL.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@database.command("upgrade")
def upgrade(as_json: AsJson = False) -> None:
    """Upgrade the schema to this version. Keeps all data, and is safe to repeat."""
    from tpo.cli.environment import read_settings
    from tpo.db import schema

    schema.upgrade(read_settings().database_url.get_secret_value())
    _print("the database has the schema of this version", as_json)


@database.command("check")
def check(as_json: AsJson = False) -> None:
    """Check that the schema is the one of this version. Exit 1 if it is not."""
    from tpo.cli.environment import read_settings
    from tpo.db import connect, schema

    engine = connect(read_settings().database_url.get_secret_value())
    try:
        schema.check(engine)
    finally:
        engine.dispose()
    _print("the database has the schema of this version", as_json)


def _print(message: str, as_json: bool) -> None:
    if as_json:
        print_json({"ok": True, "message": message})
    else:
        console().print(message)
