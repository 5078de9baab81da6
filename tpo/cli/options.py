"""Options that several commands share, and the functions that read them. The library validates their values."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tpo.cli.ui.output import USAGE, Failure

_STDIN = 0
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]{1,9})([smhdw])")

Model = Annotated[str | None, typer.Option("--model", help="Policy that writes the responses.")]
RewardModel = Annotated[str | None, typer.Option("--reward-model", help="Reward model that scores the responses.")]
PromptSet = Annotated[
    str | None, typer.Option("--prompt-set", help="Set of prompts that ask the policy to criticise and revise.")
]
Priority = Annotated[
    int | None, typer.Option("--priority", help="Priority from -100 to 100; the highest runs first.", show_default="0")
]
System = Annotated[str | None, typer.Option("--system", help="System message before the prompt.")]
Url = Annotated[str, typer.Option("--url", envvar="TPO_URL", help="URL of the API.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="TPO_API_KEY", help="API key.")]
DEFAULT_URL = "http://127.0.0.1:8000"
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


class Optimization:
    """A command with the options of an optimization, one for each parameter of a job.

    They replace its argument `parameters`, which receives the options that were given, as the API's `parameters`.
    typer reads the signature when a command is run: until then, the classes of the parameters are not imported.
    """

    def __init__(self, command: Callable[..., None]) -> None:
        functools.update_wrapper(self, command, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        self._command = command

    def __call__(self, **arguments: Any) -> None:
        """Run the command with what was given on the command line."""
        from tpo.cli.parameters import to_parameters

        given = without_none(**{name: arguments.pop(name) for name in self._options})
        self._command(**arguments, parameters=to_parameters(given))

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        from tpo.cli.parameters import annotations

        return annotations()

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self._command)
        own = [p for p in signature.parameters.values() if p.name != "parameters"]
        kind = inspect.Parameter.KEYWORD_ONLY
        added = [inspect.Parameter(name, kind, default=None, annotation=a) for name, a in self._options.items()]
        return signature.replace(parameters=[*(p.replace(kind=kind) for p in own), *added])

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        return {p.name: p.annotation for p in self.__signature__.parameters.values()}


def without_none(**options: Any) -> dict[str, Any]:
    """Return only the options that were given, by their names in the API."""
    return {name: value for name, value in options.items() if value is not None}


def duration_seconds(text: str) -> int:
    """Parse a duration such as 12h or 90d. Raises Failure if it has another form."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise Failure(f"{text!r} is not a duration: use a whole number and a unit, such as 30m, 12h, 90d or 4w", USAGE)
    return int(found[1]) * _UNIT_SECONDS[found[2]]


def read_text(prompt: str) -> str:
    """Return the prompt of an argument; `-` reads stdin. Raises Failure if stdin is not UTF-8."""
    return _read(_STDIN, "stdin") if prompt == "-" else prompt


def read_file(file: Path) -> str:
    """Read a text file. Raises Failure if it cannot be read or is not UTF-8."""
    return _read(file, str(file))


def _read(file: Path | int, name: str) -> str:
    # Not sys.stdin: in the locale C, common in containers, it turns invalid bytes into lone surrogates.
    try:
        with open(file, encoding="utf-8", closefd=file != _STDIN) as text:
            return text.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Failure(f"cannot read {name}: {reason}", USAGE) from None


def messages_of(prompt: str, system: str | None) -> list[dict[str, str]]:
    """Return a prompt as a conversation, with an optional system message."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": prompt}]
