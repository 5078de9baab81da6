"""`tpo demo`: the whole product in half a minute, with a worker that is killed during a job."""

from typing import Annotated

import typer

from tpo.cli import options


def demo(
    kill_worker: Annotated[
        bool, typer.Option(help="Kill the worker during the third job, to show that nothing is lost.")
    ] = True,
    as_json: options.AsJson = False,
) -> None:
    """Start everything, submit three jobs, kill the worker during the last one, show the results, and stop."""
    from tpo.cli.demo_script import run_demo

    raise typer.Exit(run_demo(kill_worker=kill_worker, as_json=as_json))
