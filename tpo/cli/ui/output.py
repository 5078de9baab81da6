"""Output of the commands: results on stdout, everything else on stderr, and one line for a failure."""

import codecs
import io
import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import typer
from typer._click.exceptions import ClickException
from typer.core import TyperGroup

from tpo.core.errors import InvalidInputError, TPOError

if TYPE_CHECKING:
    from rich.console import Console

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that control a terminal or the direction of text, and those that cannot be encoded.

Line feed and tab are not among them, nor is the joiner in emoji.
"""

FAILED = 1
USAGE = 2
INTERRUPTED = 130


class Failure(Exception):
    """A command cannot do what was requested. The message is meant for the person at the terminal."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Commands(TyperGroup):
    """Group of commands that turns errors into one line on stderr and an exit code."""

    def main(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Run the command line. With `--json`, its errors are JSON too, also those of the command line itself."""
        words = list(sys.argv[1:] if args is None else args)
        _errors_as_json[0] = "--json" in words[: words.index("--") if "--" in words else None]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
                stream.reconfigure(errors="backslashreplace")  # an encoding must not turn a result into an error
        if not _errors_as_json[0]:
            return super().main(words, *more, **options)
        try:
            code = super().main(words, *more, **{**options, "standalone_mode": False})
        except ClickException as error:
            _print_error(error.format_message(), error.exit_code, None)
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a command and report its errors."""
        try:
            return super().invoke(ctx)
        except Failure as error:
            _exit(str(error), error.exit_code)
        except InvalidInputError as error:
            _exit(f"{error.param}: {error}" if error.param else str(error), USAGE, error.param)
        except TPOError as error:
            _exit(str(error), FAILED)


_errors_as_json = [False]


def _exit(message: str, exit_code: int, param: str | None = None) -> None:
    _print_error(message, exit_code, param)
    raise typer.Exit(exit_code)


def _print_error(message: str, exit_code: int, param: str | None) -> None:
    if _errors_as_json[0]:
        error = {"message": message, "param": param, "exit_code": exit_code}
        print(json.dumps({"error": error}), file=sys.stderr, flush=True)
    else:
        print(f"tpo: {escaped(message)}", file=sys.stderr)


def escaped(text: str) -> str:
    """Replace the characters that control a terminal by their escapes (a backslash and hexadecimal digits)."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@cache
def _console_class() -> "type[Console]":
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        """A console that escapes whatever would control the terminal, in every text, table and rule."""

        def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
            """Render; only the console's own control codes, such as the moves of a live display, stay as they are."""
            for segment in super().render(*arguments, **options):
                yield segment if segment.control else Segment(escaped(segment.text), segment.style)

    return SafeConsole


@cache
def console() -> "Console":
    """Return the console for results, on stdout."""
    return _console_class()(highlight=False, soft_wrap=not sys.stdout.isatty())


@cache
def messages() -> "Console":
    """Return the console for progress and messages, on stderr, where a program that reads stdout does not see them."""
    return _console_class()(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on stdout."""
    # Escape if stdout cannot encode every character (PYTHONIOENCODING=ascii, an old locale): the JSON is equivalent.
    escape = codecs.lookup(sys.stdout.encoding).name != "utf-8"
    line = json.dumps(value, ensure_ascii=escape, default=str)
    # JSON's own escapes are lossless. These characters can occur only inside its strings.
    print(_UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], line), flush=True)
