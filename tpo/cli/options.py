"""Options that several commands share, and the functions that read them. The library validates their values."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tpo.cli.ui.output import USAGE, Failure

_OPTIMIZATION: dict[str, Any] = {
    "mode": Annotated[
        Literal["tpo", "revision", "bon"] | None,
        typer.Option(
            help="tpo, bon (best of N only) or revision (the critique sees no rejected response).", show_default="tpo"
        ),
    ],
    "sample_size": Annotated[
        int | None,
        typer.Option("--sample-size", "--n", "-n", help="N: responses in each step.", show_default="5"),
    ],
    "max_iterations": Annotated[
        int | None, typer.Option("--iterations", "-d", help="D: rounds of critique and revision.", show_default="2")
    ],
    "seed": Annotated[int | None, typer.Option(help="Random seed. The same seed gives the same answers.")],
    "temperature": Annotated[
        float | None, typer.Option(help="Sampling temperature of samples and updates.", show_default="0.7")
    ],
    "top_p": Annotated[float | None, typer.Option(help="Nucleus (top-p) of samples and updates.", show_default="0.95")],
    "max_tokens": Annotated[
        int | None, typer.Option(help="Maximum length of a response, in tokens.", show_default="2048")
    ],
    "max_output_tokens": Annotated[
        int | None, typer.Option(help="Budget: tokens that the policy writes in all calls.")
    ],
    "max_total_tokens": Annotated[
        int | None, typer.Option(help="Budget: tokens that the policy reads and writes in all calls.")
    ],
    "max_seconds": Annotated[float | None, typer.Option(help="Budget: seconds inside model calls.")],
    "patience": Annotated[
        int | None, typer.Option(help="Stop after this many iterations in a row without gain.", show_default="never")
    ],
    "min_gain": Annotated[
        float | None,
        typer.Option(help="Largest rise of the best reward that does not count as a gain.", show_default="0"),
    ],
    "stop_on_decline": Annotated[
        bool | None, typer.Option("--stop-on-decline", help="Stop when an iteration's mean reward falls.")
    ],
}
"""Options of an optimization, by their names in the API's `parameters`, or in `early_stop` for `_EARLY_STOP`."""

_EARLY_STOP = ("patience", "min_gain")
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


def optimization(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the options of an optimization.

    They replace its argument `parameters`, which receives the options that were given, as the API's `parameters`.
    """

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        parameters = without_none(**{name: arguments.pop(name) for name in _OPTIMIZATION})
        early_stop = {name: parameters.pop(name) for name in _EARLY_STOP if name in parameters}
        command(**arguments, parameters=parameters | without_none(early_stop=early_stop or None))

    # typer reads the options of a command from its signature.
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.name != "parameters"]
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, kind, default=None, annotation=a) for name, a in _OPTIMIZATION.items()]
    kept = [p.replace(kind=kind) for p in own]
    with_options.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in (*kept, *added)}
    return with_options


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
