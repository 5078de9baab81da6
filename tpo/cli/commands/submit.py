"""`tpo submit`: submit one or more jobs over HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpo.cli import options
from tpo.cli.options import without_none
from tpo.cli.ui.output import FAILED, USAGE, Failure, console, messages, print_json

if TYPE_CHECKING:
    from tpo.client import Job


@options.Optimization
def submit(
    parameters: dict[str, Any],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts, one job each; - reads stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="JSONL file: each line is a prompt or the body of a request."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the answers. Exit 1 if a job fails.")] = False,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which each job ends with its best answer so far.")
    ] = None,
    model: options.Model = None,
    reward_model: options.RewardModel = None,
    prompt_set: options.PromptSet = None,
    system: options.System = None,
    priority: options.Priority = None,
    url: options.Url = options.DEFAULT_URL,
    api_key: options.Key = None,
    as_json: options.AsJson = False,
) -> None:
    """Submit jobs to a server. Prints their ids or, with --wait, their answers."""
    from tpo.cli.connection import connected
    from tpo.cli.ui.progress import JobTable

    parameters |= without_none(reward_model=reward_model, prompt_set=prompt_set)
    defaults = without_none(model=model, priority=priority, parameters=parameters or None, deadline_seconds=deadline)
    bodies = [{**defaults, "input": _input(options.read_text(prompt), system)} for prompt in prompts or []]
    bodies += [] if file is None else list(_from_file(file, defaults, system))
    if not bodies:
        raise Failure("give one or more prompts (- for stdin) or --file", USAGE)
    with connected(url, api_key) as client:
        jobs = []
        for body in bodies:
            jobs.append(client.submit(body))
            if not wait:
                print_json(jobs[-1]) if as_json else console().print(jobs[-1]["id"])
        if not wait:
            return
        try:
            with JobTable(messages()) as table:
                ended = client.wait_all(jobs, progress=table.show)
        except KeyboardInterrupt:
            messages().print("The server continues with the jobs; `tpo jobs` lists them.")
            raise
    for job in ended:
        print_json(job) if as_json else _print_answer(job, with_id=len(ended) > 1)
    if any(job["status"] != "completed" for job in ended):
        raise typer.Exit(FAILED)


def _input(prompt: str, system: str | None) -> Any:
    return options.messages_of(prompt, system) if system else prompt


def _from_file(file: Path, defaults: dict[str, Any], system: str | None) -> Iterator[dict[str, Any]]:
    """Read request bodies from a JSONL file. Values of a line override those of the command line."""
    for number, line in enumerate(options.read_file(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise Failure(f"{file}, line {number} is not JSON: {error}", USAGE) from None
        if isinstance(value, str):
            yield {**defaults, "input": _input(value, system)}
        elif isinstance(value, dict) and isinstance(value.get("parameters", {}), dict):
            merged = {**defaults.get("parameters", {}), **value.get("parameters", {})}
            yield {**defaults, **value, **without_none(parameters=merged or None)}
        else:
            raise Failure(f"{file}, line {number} is neither a prompt nor the body of a request", USAGE)


def _print_answer(job: "Job", *, with_id: bool) -> None:
    if with_id:
        console().print(f"[bold]{job['id']}[/]")
    if job["output"] is not None:
        console().print(job["output"], markup=False)
    if job["status"] != "completed":
        from tpo.client import JobFailedError

        messages().print(str(JobFailedError(job)), markup=False)
