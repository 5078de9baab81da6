"""What the commands say: results on stdout, everything else on stderr, one clear line for a failure."""

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
    """A command cannot do what it was asked; the message is for the person who typed it."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Commands(TyperGroup):
    """The one place that turns errors into a line and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a command."""
        try:
            return super().invoke(ctx)
        except Failure as error:
            _end(str(error), error.exit_code)
        except InvalidInputError as error:
            _end(f"{error.param}: {error}" if error.param else str(error), USAGE)
        except TPOError as error:
            _end(str(error), FAILED)


def _end(message: str, exit_code: int) -> None:
    print(f"tpo: {message}", file=sys.stderr)
    raise typer.Exit(exit_code)


@cache
def console() -> "Console":
    """Where people read results."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


@cache
def messages() -> "Console":
    """Where people read how it goes; a program that reads stdout never sees it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def print_json(value: Any) -> None:
    """One JSON value on a line of stdout."""
    # Escaped where stdout cannot take every character (PYTHONIOENCODING=ascii, a locale of old): it is the same JSON.
    plain = codecs.lookup(sys.stdout.encoding).name != "utf-8"
    print(json.dumps(value, ensure_ascii=plain, default=str), flush=True)
