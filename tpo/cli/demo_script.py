"""The script of `tpo demo`: a temporary stack, three jobs over HTTP, and one kill -9."""

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

from tpo.cli.connection import connected
from tpo.cli.stack.temporary import Stack, temporary_stack
from tpo.cli.ui.output import FAILED, console, messages, print_json
from tpo.cli.ui.progress import JobTable
from tpo.cli.ui.record import Record, print_outcome
from tpo.client import TERMINAL, Client, Job

SAMPLE_SIZE = 4
ITERATIONS = 2
# A short lease, so that the lost worker is noticed soon. The default of 30 s tolerates an unstable network.
_SHORT_LEASE = {"TPO_LEASE_SECONDS": "3", "TPO_SWEEP_SECONDS": "0.5", "TPO_RENOTIFY_SECONDS": "2"}
_KILL_PHASES = ("gradient", "update")
_POLL_SECONDS = 0.02


def run_demo(*, kill_worker: bool, as_json: bool) -> int:
    """Run the demo and return the exit code."""
    with _interruptible(), tempfile.TemporaryDirectory(prefix="tpo-demo-") as folder:
        started = time.monotonic()
        messages().print("Starting the API, a worker, the maintenance worker, Flower and the broker ...")
        with temporary_stack(Path(folder), _SHORT_LEASE) as stack, connected(stack.facts["api"], None) as client:
            messages().print(f"Ready after {time.monotonic() - started:.0f} s. Submitting three jobs over HTTP:\n")
            return _run_jobs(client, stack, kill_worker=kill_worker, as_json=as_json)


def _run_jobs(client: Client, stack: Stack, *, kill_worker: bool, as_json: bool) -> int:
    prompts: list[str] = json.loads(resources.files("demo").joinpath("prompts.json").read_text(encoding="utf-8"))
    bodies = [_body(prompt, seed) for seed, prompt in enumerate(prompts)]
    *first, last = bodies
    done: list[Job] = []
    with JobTable(messages()) as table:
        done += client.wait_all([client.submit(body) for body in first], progress=table.show)
    for job in done:
        _report(client, job, as_json)
    same = True
    with JobTable(messages()) as table:
        submitted = client.submit(last)
        killed = kill_worker and _kill_worker_during(client, stack, submitted["id"], table)
        done.append(client.wait(submitted, progress=table.show))
    _report(client, done[-1], as_json)
    if killed:
        with JobTable(messages()) as table:
            messages().print("The same job again, without a kill:")
            undisturbed = client.wait(client.submit(last), progress=table.show)
        same = undisturbed["output"] == done[-1]["output"]
        attempts = done[-1]["attempt"]
        messages().print(
            f"[bold]The killed job took {attempts} attempts and gave "
            f"{'the same answer, word for word' if same else 'another answer: this is a defect'}.[/]\n"
        )
    messages().print(
        "Next: [bold]make up[/] keeps everything running, with the API docs at http://127.0.0.1:8000/docs\n"
        'and Flower at http://127.0.0.1:5555. Run [bold].venv/bin/tpo submit --wait "…"[/] in another terminal.'
    )
    return 0 if same and all(job["status"] == "completed" for job in done) else FAILED


def _body(prompt: str, seed: int) -> dict[str, Any]:
    parameters = {"sample_size": SAMPLE_SIZE, "max_iterations": ITERATIONS, "seed": seed}
    return {"input": prompt, "parameters": parameters}


def _report(client: Client, job: Job, as_json: bool) -> None:
    iterations, candidates = client.iterations(job["id"]), client.candidates(job["id"])
    if as_json:
        print_json({**job, "iterations": iterations, "candidates": candidates})
        return
    console().rule(job["id"], style="dim")
    console().print("Message", style="bold")
    console().print(f"{job['input']}\n", markup=False)
    if job["error"]:
        console().print(job["error"]["message"], style="red", markup=False)
    print_outcome(console(), Record.of_api(iterations, candidates))
    console().print()


def _kill_worker_during(client: Client, stack: Stack, job_id: str, table: JobTable) -> bool:
    """Kill the worker while the job revises its first answers. Returns False if the job ended too soon."""
    while True:
        job = client.get(job_id)
        table.show(job)
        if job["status"] in TERMINAL:
            messages().print("The job ended before the worker could be killed.")
            return False
        if job["status"] == "in_progress" and job["progress"]["phase"] in _KILL_PHASES:
            break
        time.sleep(_POLL_SECONDS)
    os.kill(stack.pids["worker"], signal.SIGKILL)
    recorded = sum(len(i["calls"]) for i in client.iterations(job_id))
    messages().print(
        f"[red bold]kill -9[/] of the worker in iteration {job['progress']['iteration']}, phase "
        f"{job['progress']['phase']}: {recorded} model calls are stored. A new worker continues from there ..."
    )
    return True


@contextmanager
def _interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that it too stops the stack cleanly."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
