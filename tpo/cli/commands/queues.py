"""`tpo queues`: list, pause and resume the queue of each policy, in the database of TPO_DATABASE_URL."""

import contextlib
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from tpo.cli.environment import open_store, read_settings
from tpo.cli.options import AsJson
from tpo.cli.ui.output import Commands, console, print_json

queues = typer.Typer(
    cls=Commands,
    help="Manage the queues in the database of TPO_DATABASE_URL. Each policy has one.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(help="Policy that the queue belongs to.")]


@queues.command("list")
def list_queues(as_json: AsJson = False) -> None:
    """List all queues: their waiting and running jobs, their workers, and since when they are paused."""
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
    """Pause a queue. Its running jobs stop after their current step and continue from there when it is resumed."""
    with open_store() as store:
        store.queues.pause(model)
    _print(model, "paused", as_json)


@queues.command("resume")
def resume(model: Model, as_json: AsJson = False) -> None:
    """Resume a queue, so that its jobs run again."""
    from tpo.broker import JobNotifier
    from tpo.core.errors import BrokerUnavailableError

    with open_store() as store:
        waiting = store.queues.resume(model)
    notifier = JobNotifier(read_settings().broker_url.get_secret_value())
    # If the broker cannot be reached, the rescuer sends the notifications later.
    with contextlib.closing(notifier), contextlib.suppress(BrokerUnavailableError):
        for job_id in waiting:
            notifier.notify_job(job_id, model)
    _print(model, "resumed", as_json)


def _print(model: str, state: str, as_json: bool) -> None:
    if as_json:
        print_json({"model": model, "state": state})
    else:
        console().print(f"the queue of {model} is {state}", markup=False)
