"""Output of the commands: results on stdout, everything else on stderr, and one line for a failure."""

import codecs
import json
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from tpo.core.errors import InvalidInputError, TPOError

if TYPE_CHECKING:
    from rich.console import Console

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

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a command and report its errors."""
        try:
            return super().invoke(ctx)
        except Failure as error:
            _exit(str(error), error.exit_code)
        except InvalidInputError as error:
            _exit(f"{error.param}: {error}" if error.param else str(error), USAGE)
        except TPOError as error:
            _exit(str(error), FAILED)


def _exit(message: str, exit_code: int) -> None:
    print(f"tpo: {message}", file=sys.stderr)
    raise typer.Exit(exit_code)


@cache
def console() -> "Console":
    """Return the console for results, on stdout."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


@cache
def messages() -> "Console":
    """Return the console for progress and messages, on stderr, where a program that reads stdout does not see them."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_json(value: Any) -> None:
    """Print a value as one line of JSON on stdout."""
    # Escape if stdout cannot encode every character (PYTHONIOENCODING=ascii, an old locale): the JSON is equivalent.
    escape = codecs.lookup(sys.stdout.encoding).name != "utf-8"
    print(json.dumps(value, ensure_ascii=escape, default=str), flush=True)
