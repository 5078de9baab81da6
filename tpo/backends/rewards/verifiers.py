"""Parts that look at the text alone: length, pattern, JSON schema. Each gives one number for one response."""

import json
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import regex

from tpo.backends.rewards.config import JsonPart, LengthPart, RegexPart

_log = logging.getLogger(__name__)

Verifier = Callable[[str], float]

LONGEST_SEARCH_SECONDS = 5.0
"""How long a pattern may look through one response; some backtrack for ever."""

_FENCED = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def length(part: LengthPart) -> Verifier:
    """0 within the bounds; minus the share by which a bound is missed: twice as long as allowed is -1."""

    def value(response: str) -> float:
        size = len(response.split()) if part.unit == "words" else len(response)
        if size > part.most:
            return 1 - size / part.most
        return size / part.least - 1 if size < part.least else 0.0

    return value


def pattern(part: RegexPart) -> Verifier:
    """1 where the response is as the pattern wants it, else 0; NaN where the search takes too long."""
    compiled = regex.compile(part.pattern)

    def value(response: str) -> float:
        try:
            # Other threads run meanwhile: they renew the leases.
            found = compiled.search(response, timeout=LONGEST_SEARCH_SECONDS, concurrent=True)
        except TimeoutError:
            _log.warning("the pattern of the part %s looked at a response for too long and was stopped", part.name)
            return math.nan
        return float((found is None) == part.absent)

    return value


def json_schema(part: JsonPart) -> Verifier:
    """1 where the response is JSON that fits, else 0."""
    validator = jsonschema_rs.validator_for(part.json_schema)

    def value(response: str) -> float:
        fenced = _FENCED.fullmatch(response)
        try:
            found: Any = json.loads(fenced.group(1) if fenced else response)
            return float(validator.is_valid(found))
        except (ValueError, RecursionError):
            return 0.0

    return value
