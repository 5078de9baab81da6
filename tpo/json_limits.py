"""Limits on the structure of JSON, checked on its bytes before anything is parsed.

A parser and a validator hold the interpreter for as long as a document has values. Counting stops at the bound.
"""

import re
from dataclasses import dataclass

from tpo import validation_messages
from tpo.core.errors import InvalidInputError

MAX_VALUES = 10_000
"""Values in one document: a conversation of a thousand messages, each with a part of text, has 6,001."""

MAX_ITEMS = 1000
"""Items of one array."""

MAX_FIELDS = 100
"""Fields of one object."""

MAX_DEPTH = 100
"""Arrays and objects inside each other."""

# A string may end with the document, so that each byte is read once; possessive, so that none costs memory.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},:]', re.DOTALL)
_QUOTE, _COMMA, _COLON, _ARRAY, _OBJECT = b'",:[{'
_SHOWN_BYTES = 1000


class InvalidJSONError(InvalidInputError):
    """The document is not JSON in UTF-8, or it is nested too deeply."""

    status = 400
    code = "invalid_json"


@dataclass(slots=True)
class _Container:
    is_array: bool
    commas: int = 0
    key: tuple[int, int] = (0, 0)
    """Where the name of an object's present field begins and ends."""


def check_structure(content: bytes) -> None:
    """Check the counts of a document; whether it is JSON is left to the parser.

    Raises InvalidInputError, which names the place, and InvalidJSONError for nesting that is too deep.
    """
    if content.count(b",") + content.count(b"[") + content.count(b"{") < min(MAX_FIELDS, MAX_DEPTH):
        return
    open_containers: list[_Container] = []
    values = 1
    string = (0, 0)
    for token in _TOKEN.finditer(content):
        symbol = content[token.start()]
        if symbol == _QUOTE:
            string = token.span()
        elif symbol in (_ARRAY, _OBJECT):
            open_containers.append(_Container(symbol == _ARRAY))
            values += 1
            if len(open_containers) > MAX_DEPTH:
                raise InvalidJSONError(f"The document is nested too deeply: at most {MAX_DEPTH} levels are allowed.")
        elif not open_containers:
            continue  # not JSON, as the parser will report
        elif symbol == _COLON:
            open_containers[-1].key = string
        elif symbol == _COMMA:
            open_containers[-1].commas += 1
            values += 1
            _check_items(content, open_containers)
        else:
            open_containers.pop()
        if values > MAX_VALUES:
            place = _place(content, open_containers)
            message = f"{place or 'the body'}: has more than {MAX_VALUES} values in and before it."
            raise InvalidInputError(message, place or None)


def _check_items(content: bytes, open_containers: list[_Container]) -> None:
    container = open_containers[-1]
    limit, noun = (MAX_ITEMS, "items") if container.is_array else (MAX_FIELDS, "fields")
    if container.commas >= limit:
        place = _place(content, open_containers[:-1])
        raise InvalidInputError(f"{place or 'the body'}: has more than {limit} {noun}.", place or None)


def _place(content: bytes, open_containers: list[_Container]) -> str:
    """Return the name of the value that is read in the innermost of these containers."""
    return validation_messages.name(
        [
            container.commas if container.is_array else _text(content[slice(*container.key)][:_SHOWN_BYTES])
            for container in open_containers
        ]
    )


def _text(string: bytes) -> str:
    return string.strip(b'"').decode("utf-8", "replace")
