"""Parts that look at the text alone: length, pattern, JSON schema. Each gives one number for one response."""

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema_rs

from tpo.backends.rewards.config import JsonPart, LengthPart, RegexPart

Verifier = Callable[[str], float]

_FENCED = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def length(part: LengthPart) -> Verifier:
    """0 within the bounds; minus the share by which a bound is missed: twice as long as allowed is -1."""

    def value(response: str) -> float:
        size = len(response.split()) if part.unit == "words" else len(response)
        if size > part.most:
            return 1 - size / part.most
        return size / part.least - 1 if size < part.least else 0.0

    return value


def regex(part: RegexPart) -> Verifier:
    """1 where the response is as the pattern wants it, else 0."""
    pattern = re.compile(part.pattern)
    return lambda response: float((pattern.search(response) is None) == part.absent)


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
