"""`tpo jobs`, `tpo show`, and what is done to a job that a server knows, over HTTP."""

from typing import TYPE_CHECKING, Annotated, cast

import typer

from tpo.cli import options
from tpo.cli.ui.output import console, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from tpo.client import Client, Job, Status

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


def jobs(
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, max=100, help="How many.")] = 20,
    status: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """List the newest jobs."""
    from tpo.cli.connection import connected
    from tpo.cli.ui.progress import table

    with connected(url, api_key) as server:
        found = [*server.list(limit=limit, status=cast("Status", status) if status else ())]
    if as_json:
        print_json(found)
    elif found:
        console().print(table(found))
    else:
        console().print("no jobs")


def show(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Show one job: its iterations with critique, gradient, rewards and candidates, and what came of it."""
    from tpo.cli.connection import connected
    from tpo.cli.ui.record import Record, print_record

    with connected(url, api_key) as server:
        job, iterations, candidates = server.get(job_id), server.iterations(job_id), server.candidates(job_id)
    if as_json:
        print_json({**job, "iterations": iterations, "candidates": candidates})
    else:
        print_record(console(), job, Record.of_api(iterations, candidates))


def cancel(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Ask for a job's end. A job that has ended stays as it is."""
    _tell(url, api_key, as_json, lambda server: server.cancel(job_id))


def pause(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Hold a job: at once while it waits, within one model call while it runs."""
    _tell(url, api_key, as_json, lambda server: server.pause(job_id))


def resume(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Let a paused job go on from where it stopped."""
    _tell(url, api_key, as_json, lambda server: server.resume(job_id))


def retry(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Try a job again. Of one that ended without success a new one goes on from its record."""
    _tell(url, api_key, as_json, lambda server: server.retry(job_id))


def extend(
    job_id: JobId,
    iterations: Annotated[int, typer.Option("--iterations", "-d", min=1, help="How many more.")],
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Go on with a job that has ended, in a new one: more iterations on what it has."""
    _tell(url, api_key, as_json, lambda server: server.extend(job_id, iterations))


def delete(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Forget a job that has ended, with all its texts."""
    from tpo.cli.connection import connected

    with connected(url, api_key) as server:
        server.delete(job_id)
    print_json({"id": job_id, "deleted": True}) if as_json else console().print(f"{job_id} is deleted")


def _tell(url: str, api_key: str | None, as_json: bool, act: "Callable[[Client], Job]") -> None:
    from tpo.cli.connection import connected

    with connected(url, api_key) as server:
        job = act(server)
    if as_json:
        print_json(job)
        return
    asked = " and will be paused" if job["pause_requested_at"] is not None else ""
    source = f", going on from {job['source_id']}" if job["source_id"] and not job["started_at"] else ""
    console().print(f"{job['id']} is {job['status']}{asked}{source}")
