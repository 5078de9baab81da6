"""`tpo demo`: the whole product in half a minute, with a worker that is killed in the middle."""

from typing import Annotated

import typer

from tpo.cli import options


def demo(
    kill_worker: Annotated[
        bool, typer.Option(help="Kill the worker in the middle of the third job, and show that nothing is lost.")
    ] = True,
    as_json: options.AsJson = False,
) -> None:
    """Start everything, submit three jobs, kill the worker in the middle, show what came of it, stop everything."""
    from tpo.cli.demo_script import showcase

    raise typer.Exit(showcase(kill_worker=kill_worker, as_json=as_json))
