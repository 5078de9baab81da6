"""Turn pydantic errors into messages that name the field and never quote its value."""

from collections.abc import Callable, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tpo.core.errors import InvalidInputError

_SHOWN_ERRORS = 5
_LONGEST_NAME = 1000
_SHAPES = ("text", "messages")
"""Tags of a discriminated union, which are not part of a field's name."""


def invalid(error: ValidationError, renamed: Callable[[str], str] = str) -> InvalidInputError:
    """Convert a validation error; `renamed` maps a field to the name that the request's author used."""
    return from_errors(error.errors(include_url=False, include_context=False, include_input=False), renamed)


def from_errors(errors: Sequence[ErrorDetails], renamed: Callable[[str], str] = str) -> InvalidInputError:
    """Convert pydantic's errors, whose locations start with the field."""
    if errors[0]["type"] == "string_unicode" and not errors[0]["loc"]:
        return InvalidInputError("A field's name is not valid Unicode.")
    messages = [f"{renamed(name(e['loc'])) or 'the value'}: {_message(e)}" for e in errors[:_SHOWN_ERRORS]]
    more = len(errors) - len(messages)
    detail = "; ".join([*messages, *([f"and {more} more"] if more else [])])
    return InvalidInputError(detail, renamed(name(errors[0]["loc"])) or None)


def name(location: Sequence[int | str]) -> str:
    """Format a location as a client writes it: `input[0].content`, `parameters.top_p`."""
    path = ""
    for position, part in enumerate(location):
        if part == "[key]" or (position == 1 and location[0] == "input" and part in _SHAPES):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:_LONGEST_NAME]


def _message(error: ErrorDetails) -> str:
    match error["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return "is not a known field"
        case "string_unicode":
            return "is not valid Unicode"
        case _:
            return str(error["msg"]).removeprefix("Value error, ")
