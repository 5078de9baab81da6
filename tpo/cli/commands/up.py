"""`tpo up`: run all services on this machine, without an installed database or broker."""

from pathlib import Path
from typing import Annotated, Any

import typer


def up(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address that the API binds to. Any but loopback needs TPO_API_KEY or TPO_REQUIRE_KEY.",
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
    data_dir: Annotated[
        Path, typer.Option(help="Folder of the database, the broker's data and the logs.", file_okay=False)
    ] = Path(".tpo"),
    workers: Annotated[int, typer.Option(min=1, max=64, help="Number of worker processes. Each loads the models.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Run the API, workers, the maintenance worker, Flower and a broker. Ctrl-C drains and stops them.

    Uses TPO_DATABASE_URL and TPO_BROKER_URL, if set, in place of the embedded database and broker.
    """
    from tpo.cli.environment import read_settings
    from tpo.cli.stack.run import Report, Stack, run_stack

    overrides: dict[str, Any] = {"host": host, "port": port, "flower_port": flower_port}
    settings = read_settings(**{name: value for name, value in overrides.items() if value is not None})
    stack = Stack.plan(settings, data_dir.absolute(), broker_port=broker_port, workers=workers)
    raise typer.Exit(run_stack(stack, Report(as_json)))
