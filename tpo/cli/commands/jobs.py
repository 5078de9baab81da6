"""Commands that list, show and change the jobs of a server, over HTTP."""

from typing import TYPE_CHECKING, Annotated, cast

import typer

from tpo.cli import options
from tpo.cli.ui.output import console, print_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from tpo.client import Client, Job, Status

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


def jobs(
    limit: Annotated[int, typer.Option("--limit", "-l", min=1, max=100, help="Maximum number of jobs.")] = 20,
    status: Annotated[str | None, typer.Option(help="List only jobs with this status.")] = None,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """List the newest jobs."""
    from tpo.cli.connection import connected
    from tpo.cli.ui.progress import table

    with connected(url, api_key) as client:
        found = [*client.list(limit=limit, status=cast("Status", status) if status else ())]
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
    """Show a job: its iterations with critiques, gradients, candidates and rewards, and its result."""
    from tpo.cli.connection import connected
    from tpo.cli.ui.record import Record, print_record

    with connected(url, api_key) as client:
        job, iterations, candidates = client.get(job_id), client.iterations(job_id), client.candidates(job_id)
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
    """Cancel a job. A job that has already ended is not changed."""
    _change(url, api_key, as_json, lambda client: client.cancel(job_id))


def pause(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Pause a job: immediately if it waits, within one model call if it runs."""
    _change(url, api_key, as_json, lambda client: client.pause(job_id))


def resume(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Resume a paused job where it stopped."""
    _change(url, api_key, as_json, lambda client: client.resume(job_id))


def retry(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Retry a job. If it ended without success, a new job continues from its record."""
    _change(url, api_key, as_json, lambda client: client.retry(job_id))


def extend(
    job_id: JobId,
    iterations: Annotated[int, typer.Option("--iterations", "-d", min=1, help="Number of further iterations.")],
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Continue a job that has ended, with more iterations, in a new job."""
    _change(url, api_key, as_json, lambda client: client.extend(job_id, iterations))


def delete(
    job_id: JobId,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Delete a job that has ended, with all its texts."""
    from tpo.cli.connection import connected

    with connected(url, api_key) as client:
        client.delete(job_id)
    print_json({"id": job_id, "deleted": True}) if as_json else console().print(f"{job_id} is deleted")


def _change(url: str, api_key: str | None, as_json: bool, action: "Callable[[Client], Job]") -> None:
    """Apply an action to a job and print the job."""
    from tpo.cli.connection import connected

    with connected(url, api_key) as client:
        job = action(client)
    if as_json:
        print_json(job)
        return
    pausing = " and will be paused" if job["pause_requested_at"] is not None else ""
    source = f", continued from {job['source_id']}" if job["source_id"] and not job["started_at"] else ""
    console().print(f"{job['id']} is {job['status']}{pausing}{source}")
