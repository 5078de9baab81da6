"""Parse chat completions: texts separated from their reasoning, finish reasons and token counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from tpo.backends.reasoning import split_reasoning
from tpo.backends.remote.server import Malformed
from tpo.core.ports import Text
from tpo.core.state import FinishReason

_CHARACTERS_PER_TOKEN = 4
"""Estimate for servers that report no token counts."""

_ABORTED = frozenset({"abort", "error"})
"""Finish reasons of SGLang and proxies for a text that was aborted on their side. Such a choice is ignored."""

_CUT_OFF = frozenset({"length", "content_filter", "max_tokens"})


class _Message(BaseModel):
    content: str | list[dict[str, Any]] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Details(BaseModel):
    reasoning_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    completion_tokens_details: _Details | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True)
class Reply:
    """The texts of one request, with token counts."""

    texts: tuple[Text, ...]
    input_tokens: int | None
    reasoning_tokens: int


def read_completion(reply: Any) -> Reply:
    """Parse the JSON of a chat completion. Raises Malformed if it is not one."""
    try:
        completion = _Completion.model_validate(reply)
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
        raise Malformed(f"not with a chat completion ({where or 'no object'} is missing or wrong)") from None
    choices = [c for c in completion.choices if c.finish_reason not in _ABORTED]
    parts = [_split_message(choice.message) for choice in choices]
    usage = completion.usage
    characters = [len(part) for pair in parts for part in pair]
    counted = usage.completion_tokens if usage and len(choices) == len(completion.choices) else 0
    tokens = _distribute(counted, characters, _reasoning_tokens(usage) if counted else None)
    texts = [
        Text(text=text, finish_reason=_finish_reason(choice.finish_reason), tokens=tokens[2 * i])
        for i, (choice, (text, _)) in enumerate(zip(choices, parts, strict=True))
    ]
    return Reply(tuple(texts), usage.prompt_tokens if usage else None, sum(tokens[1::2]))


def estimate_tokens(characters: int) -> int:
    """Estimate the tokens in a text of that many characters."""
    return math.ceil(characters / _CHARACTERS_PER_TOKEN)


def _split_message(message: _Message) -> tuple[str, str]:
    """Return the answer and the reasoning in a message."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content)
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        return content.lstrip(), reasoning
    return split_reasoning(content)


def _finish_reason(reported: str | None) -> FinishReason:
    """Map a finish reason. A content filter cuts a text off like a limit does: the text never counts as complete."""
    return "length" if reported in _CUT_OFF else "stop"


def _reasoning_tokens(usage: _Usage | None) -> int | None:
    details = usage.completion_tokens_details if usage else None
    return details.reasoning_tokens if details else None


def _distribute(counted: int, characters: Sequence[int], reasoning_tokens: int | None) -> list[int]:
    """Return the tokens of answers (even indices) and of their reasoning (odd indices).

    A server reports one count for all texts of a request. Each text gets a share proportional to its length in
    characters, and the shares add up exactly.
    """
    if not counted:
        return [estimate_tokens(n) for n in characters]
    answers, reasoning = list(characters[::2]), list(characters[1::2])
    if reasoning_tokens is None:
        return _proportional(counted, characters)
    reasoning_tokens = min(reasoning_tokens, counted)
    pairs = zip(
        _proportional(counted - reasoning_tokens, answers), _proportional(reasoning_tokens, reasoning), strict=True
    )
    return [tokens for pair in pairs for tokens in pair]


def _proportional(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` into whole numbers proportional to the weights, with the exact sum."""
    total_weight = sum(weights)
    if not total_weight:
        return [total if i == 0 else 0 for i in range(len(weights))]
    shares, assigned, weight_so_far = [], 0, 0
    for weight in weights:
        weight_so_far += weight
        share = round(total * weight_so_far / total_weight) - assigned
        shares.append(share)
        assigned += share
    return shares
