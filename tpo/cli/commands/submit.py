"""`tpo submit`: submit one or more jobs over HTTP."""

import hashlib
import json
from collections import Counter
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
    resubmit: Annotated[
        bool, typer.Option("--resubmit", help="Create new jobs for lines of --file that were submitted before.")
    ] = False,
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
    bodies: list[tuple[dict[str, Any], str | None]]
    bodies = [({**defaults, "input": _input(options.read_text(prompt), system)}, None) for prompt in prompts or []]
    if file is not None:
        from_file = list(_from_file(file, defaults, system))
        bodies += zip(from_file, _idempotency_keys(from_file, resubmit), strict=True)
    if not bodies:
        raise Failure("give one or more prompts (- for stdin) or --file", USAGE)
    with connected(url, api_key) as client:
        jobs = []
        for body, key in bodies:
            jobs.append(client.submit(body, idempotency_key=key))
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
    """Read request bodies from a JSONL file. Values of a line override those of the command line.

    Raises Failure, which names the line, before anything is submitted.
    """
    from pydantic import ValidationError

    from tpo import validation_messages
    from tpo.core.errors import InvalidInputError
    from tpo.jobs.submission import Submit

    for number, line in enumerate(options.read_file(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise Failure(f"{file}:{number}: is not JSON: {error}", USAGE) from None
        if isinstance(value, str):
            body = {**defaults, "input": _input(value, system)}
        elif isinstance(value, dict) and isinstance(value.get("parameters", {}), dict):
            merged = {**defaults.get("parameters", {}), **value.get("parameters", {})}
            body = {**defaults, **value, **without_none(parameters=merged or None)}
        else:
            raise Failure(f"{file}:{number}: is neither a prompt nor the body of a request", USAGE)
        try:
            Submit.model_validate_json(json.dumps(body))
        except ValidationError as error:
            raise Failure(f"{file}:{number}: {validation_messages.invalid(error)}", USAGE) from None
        except InvalidInputError as error:
            raise Failure(f"{file}:{number}: {error}", USAGE) from None
        yield body


def _idempotency_keys(bodies: list[dict[str, Any]], resubmit: bool) -> list[str | None]:
    """Return a key for each body of a file, so that a second run of an interrupted command creates no job twice.

    The key depends on the body and on how often the same body came before it: other lines may be changed or added.
    """
    if resubmit:
        return [None] * len(bodies)
    seen: Counter[str] = Counter()
    keys: list[str | None] = []
    for body in bodies:
        text = json.dumps(body, sort_keys=True)
        keys.append("tpo-submit-" + hashlib.sha256(f"{seen[text]} {text}".encode()).hexdigest())
        seen[text] += 1
    return keys


def _print_answer(job: "Job", *, with_id: bool) -> None:
    if with_id:
        console().print(f"[bold]{job['id']}[/]")
    if job["output"] is not None:
        console().print(job["output"], markup=False)
    if job["status"] != "completed":
        from tpo.client import JobFailedError

        messages().print(str(JobFailedError(job)), markup=False)
