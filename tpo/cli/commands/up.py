"""`tpo up`: everything on this machine with nothing installed."""

from pathlib import Path
from typing import Annotated, Any

import typer


def up(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address of the API. Others than loopback need TPO_API_KEY or TPO_REQUIRE_KEY.",
            show_default="TPO_HOST, or 127.0.0.1",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the API.", show_default="TPO_PORT, or 8000")
    ] = None,
    flower_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of Flower.", show_default="TPO_FLOWER_PORT, or 5555")
    ] = None,
    broker_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of the embedded broker, on loopback.")
    ] = 6479,
    data_dir: Annotated[Path, typer.Option(help="Database, queue and logs.", file_okay=False)] = Path(".tpo"),
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes; each loads the models.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for what happens.")] = False,
) -> None:
    """Run the API, workers, the sweeper, Flower and their broker. Ctrl-C drains them all.

    TPO_DATABASE_URL and TPO_BROKER_URL, when set, are used instead of the embedded database and broker.
    """
    from tpo.cli.environment import read_settings
    from tpo.cli.stack.run import Report, Stack, run_stack

    given: dict[str, Any] = {"host": host, "port": port, "flower_port": flower_port}
    settings = read_settings(**{name: value for name, value in given.items() if value is not None})
    stack = Stack.plan(settings, data_dir.absolute(), broker_port=broker_port, workers=workers)
    raise typer.Exit(run_stack(stack, Report(as_json)))
