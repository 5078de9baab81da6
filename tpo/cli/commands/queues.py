"""`tpo queues`: the jobs of each policy, as the database of TPO_DATABASE_URL has them."""

import contextlib
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from tpo.cli.environment import open_store, read_settings
from tpo.cli.options import AsJson
from tpo.cli.ui.output import Commands, console, print_json

queues = typer.Typer(
    cls=Commands, help="The queues in the database of TPO_DATABASE_URL, one for each policy.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="The policy whose jobs they are.")]


@queues.command("list")
def list_queues(as_json: AsJson = False) -> None:
    """List all queues: how many jobs wait and run, and since when a queue is paused."""
    settings = read_settings()
    with open_store() as store:
        found = store.queues.page(settings.worker_timeout_seconds)
    if as_json:
        print_json([asdict(queue) for queue in found])
        return
    from rich.table import Table

    table = Table("policy", "waiting", "running", "workers", "paused since", box=None)
    for queue in found:
        counts = (str(count) for count in (queue.waiting, queue.running, queue.workers))
        since = queue.paused_at and datetime.fromtimestamp(queue.paused_at, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(queue.model, *counts, since or "")
    console().print(table if found else "no queues")


@queues.command("pause")
def pause(model: Model, as_json: AsJson = False) -> None:
    """Let none of its jobs run. Those that do stop after their present step, and go on from there at the resume."""
    with open_store() as store:
        store.queues.pause(model)
    _say(model, "paused", as_json)


@queues.command("resume")
def resume(model: Model, as_json: AsJson = False) -> None:
    """Let its jobs run again."""
    from tpo.broker import JobNotifier
    from tpo.core.errors import BrokerUnavailableError

    with open_store() as store:
        waiting = store.queues.resume(model)
    notifier = JobNotifier(read_settings().broker_url.get_secret_value())
    # Where the broker is away, the sweeper rings in its turn.
    with contextlib.closing(notifier), contextlib.suppress(BrokerUnavailableError):
        for job_id in waiting:
            notifier.notify_job(job_id, model)
    _say(model, "resumed", as_json)


def _say(model: str, state: str, as_json: bool) -> None:
    if as_json:
        print_json({"model": model, "state": state})
    else:
        console().print(f"the queue of {model} is {state}", markup=False)
