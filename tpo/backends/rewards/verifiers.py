"""Verifiers that read only the text: length, pattern, JSON schema. Each returns one number for one response."""

import json
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import regex

from tpo.backends.rewards.config import JsonPart, LengthPart, RegexPart
from tpo.backends.rewards.schemas import compile_schema

_log = logging.getLogger(__name__)

Verifier = Callable[[str], float]

LONGEST_SEARCH_SECONDS = 5.0
"""Time limit for one search in one response; some patterns backtrack practically without end."""

_FENCED = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def length(part: LengthPart) -> Verifier:
    """Create a length verifier.

    Its value is 0 within the bounds, otherwise minus the fraction by which the bound is missed: a response twice as
    long as allowed scores -1.
    """

    def value(response: str) -> float:
        size = len(response.split()) if part.unit == "words" else len(response)
        if size > part.most:
            return 1 - size / part.most
        return size / part.least - 1 if size < part.least else 0.0

    return value


def pattern(part: RegexPart) -> Verifier:
    """Create a pattern verifier: 1 if the response satisfies the pattern, else 0; NaN if the search takes too long."""
    compiled = regex.compile(part.pattern)

    def value(response: str) -> float:
        try:
            # Release the GIL: other threads must renew the leases meanwhile.
            found = compiled.search(response, timeout=LONGEST_SEARCH_SECONDS, concurrent=True)
        except TimeoutError:
            _log.warning("the search for the pattern of reward part %s took too long and was stopped", part.name)
            return math.nan
        return float((found is None) == part.absent)

    return value


def json_schema(part: JsonPart) -> Verifier:
    """Create a JSON verifier: 1 if the response is JSON that matches the schema, else 0."""
    validator = compile_schema(part.json_schema)

    def value(response: str) -> float:
        fenced = _FENCED.fullmatch(response)
        try:
            found: Any = json.loads(fenced.group(1) if fenced else response)
            return float(validator.is_valid(found))
        except (ValueError, RecursionError):
            return 0.0

    return value
