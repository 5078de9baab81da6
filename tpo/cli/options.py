"""Options that several commands share, and what they make of them. What may stand in them is checked by the library."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tpo.cli.ui.output import USAGE, Failure

_OPTIMIZATION: dict[str, Any] = {
    "mode": Annotated[
        Literal["tpo", "revision", "bon"] | None,
        typer.Option(
            help="bon: best of N alone; revision: the critique sees no rejected response.", show_default="tpo"
        ),
    ],
    "sample_size": Annotated[
        int | None, typer.Option("--sample-size", "--n", "-n", help="N: responses in each step.", show_default="5")
    ],
    "max_iterations": Annotated[
        int | None, typer.Option("--iterations", "-d", help="D: rounds of critique.", show_default="2")
    ],
    "seed": Annotated[int | None, typer.Option(help="The same seed gives the same answers.")],
    "temperature": Annotated[float | None, typer.Option(help="Of samples and updates.", show_default="0.7")],
    "top_p": Annotated[float | None, typer.Option(help="Of samples and updates.", show_default="0.95")],
    "max_tokens": Annotated[int | None, typer.Option(help="Longest response.", show_default="2048")],
    "max_output_tokens": Annotated[int | None, typer.Option(help="Budget: tokens that the policy writes in all.")],
    "max_total_tokens": Annotated[
        int | None, typer.Option(help="Budget: tokens that the policy reads and writes in all.")
    ],
    "max_seconds": Annotated[float | None, typer.Option(help="Budget: seconds inside model calls.")],
    "patience": Annotated[
        int | None, typer.Option(help="End after so many iterations that bring no gain.", show_default="go on")
    ],
    "min_gain": Annotated[
        float | None, typer.Option(help="A rise of the best reward by no more than this is no gain.", show_default="0")
    ],
    "stop_on_decline": Annotated[
        bool | None, typer.Option("--stop-on-decline", help="End when an iteration's mean reward falls.")
    ],
}
"""How to optimize, by the names of the API's parameters; those of `early_stop` by their own."""

_EARLY_STOP = ("patience", "min_gain")
_STDIN = 0

Model = Annotated[str | None, typer.Option("--model", help="The policy.")]
RewardModel = Annotated[str | None, typer.Option("--reward-model", help="What scores its responses.")]
PromptSet = Annotated[str | None, typer.Option("--prompt-set", help="How the policy is asked to criticise and revise.")]
Priority = Annotated[
    int | None, typer.Option("--priority", help="From -100 to 100; higher goes first.", show_default="0")
]
System = Annotated[str | None, typer.Option("--system", help="A system message before the prompt.")]
Url = Annotated[str, typer.Option("--url", envvar="TPO_URL", help="Address of the API.")]
Key = Annotated[str | None, typer.Option("--api-key", envvar="TPO_API_KEY", help="Its key.")]
DEFAULT_URL = "http://127.0.0.1:8000"
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]


def optimization(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of an optimization, in place of its argument `parameters`: those that were typed."""

    @functools.wraps(command)
    def with_options(**typed: Any) -> None:
        parameters = given(**{name: typed.pop(name) for name in _OPTIMIZATION})
        early_stop = {name: parameters.pop(name) for name in _EARLY_STOP if name in parameters}
        command(**typed, parameters=parameters | given(early_stop=early_stop or None))

    # typer reads the options of a command off its signature.
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.name != "parameters"]
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, kind, default=None, annotation=a) for name, a in _OPTIMIZATION.items()]
    listed = [p.replace(kind=kind) for p in own]
    with_options.__signature__ = signature.replace(parameters=[*listed, *more])  # type: ignore[attr-defined]
    with_options.__annotations__ = {p.name: p.annotation for p in (*listed, *more)}
    return with_options


def given(**options: Any) -> dict[str, Any]:
    """The options that were typed, by their names in the API."""
    return {name: value for name, value in options.items() if value is not None}


def read_text(prompt: str) -> str:
    """A prompt as it was typed; `-` is all of stdin."""
    return _read(_STDIN, "stdin") if prompt == "-" else prompt


def read_file(file: Path) -> str:
    """The text of a file."""
    return _read(file, str(file))


def _read(file: Path | int, name: str) -> str:
    # Not sys.stdin: in the locale C, which containers have, it turns bytes that are no text into half surrogate pairs.
    try:
        with open(file, encoding="utf-8", closefd=file != _STDIN) as text:
            return text.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise Failure(f"cannot read {name}: {reason}", USAGE) from None


def messages_of(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A prompt as a conversation."""
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": prompt}]
