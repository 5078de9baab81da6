"""What `tpo demo` shows: a stack of its own in a temporary folder, three jobs over HTTP, one kill -9."""

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
# A lost worker is noticed within this time; the default of 30 s is made for networks that stutter.
_SHORT_LEASE = {"TPO_LEASE_SECONDS": "3", "TPO_SWEEP_SECONDS": "0.5", "TPO_RENOTIFY_SECONDS": "2"}
_MIDDLE = ("gradient", "update")
_LOOK_SECONDS = 0.02


def showcase(*, kill_worker: bool, as_json: bool) -> int:
    """Run the demo. Gives the exit code."""
    with _interruptible(), tempfile.TemporaryDirectory(prefix="tpo-demo-") as folder:
        began = time.monotonic()
        messages().print("Starting the API, a worker, the sweeper, Flower and their broker ...")
        with temporary_stack(Path(folder), _SHORT_LEASE) as stack, connected(stack.facts["api"], None) as server:
            messages().print(f"Ready after {time.monotonic() - began:.0f} s. Three jobs, sent over HTTP:\n")
            return _show(server, stack, kill_worker=kill_worker, as_json=as_json)


def _show(server: Client, stack: Stack, *, kill_worker: bool, as_json: bool) -> int:
    prompts: list[str] = json.loads(resources.files("demo").joinpath("prompts.json").read_text(encoding="utf-8"))
    bodies = [_body(prompt, seed) for seed, prompt in enumerate(prompts)]
    *first, last = bodies
    done: list[Job] = []
    with JobTable(messages()) as board:
        done += server.wait_all([server.submit(body) for body in first], progress=board.show)
    for job in done:
        _report(server, job, as_json)
    same = True
    with JobTable(messages()) as board:
        submitted = server.submit(last)
        killed = kill_worker and _kill_in_the_middle(server, stack, submitted["id"], board)
        done.append(server.wait(submitted, progress=board.show))
    _report(server, done[-1], as_json)
    if killed:
        with JobTable(messages()) as board:
            messages().print("The same job once more, with nobody killed:")
            undisturbed = server.wait(server.submit(last), progress=board.show)
        same = undisturbed["output"] == done[-1]["output"]
        attempts = done[-1]["attempt"]
        messages().print(
            f"[bold]The killed job took {attempts} attempts and gave "
            f"{'the same answer, word for word' if same else 'another answer: that is a defect'}.[/]\n"
        )
    messages().print(
        "Now on your own: [bold]make up[/] keeps everything running, with the API docs at http://127.0.0.1:8000/docs\n"
        'and Flower at http://127.0.0.1:5555; then [bold].venv/bin/tpo submit --wait "…"[/] in another terminal.'
    )
    return 0 if same and all(job["status"] == "completed" for job in done) else FAILED


def _body(prompt: str, seed: int) -> dict[str, Any]:
    parameters = {"sample_size": SAMPLE_SIZE, "max_iterations": ITERATIONS, "seed": seed}
    return {"input": prompt, "parameters": parameters}


def _report(server: Client, job: Job, as_json: bool) -> None:
    iterations, candidates = server.iterations(job["id"]), server.candidates(job["id"])
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


def _kill_in_the_middle(server: Client, stack: Stack, job_id: str, board: JobTable) -> bool:
    """kill -9 while the job revises its first answers; False where it was too fast for that."""
    while True:
        job = server.get(job_id)
        board.show(job)
        if job["status"] in TERMINAL:
            messages().print("The job was done before the worker could be killed.")
            return False
        if job["status"] == "in_progress" and job["progress"]["phase"] in _MIDDLE:
            break
        time.sleep(_LOOK_SECONDS)
    os.kill(stack.pids["worker"], signal.SIGKILL)
    made = sum(len(i["calls"]) for i in server.iterations(job_id))
    messages().print(
        f"[red bold]kill -9[/] of the worker in iteration {job['progress']['iteration']}, phase "
        f"{job['progress']['phase']}: {made} model calls stand in the database. A new worker goes on from there ..."
    )
    return True


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as cleanly as Ctrl-C does."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
