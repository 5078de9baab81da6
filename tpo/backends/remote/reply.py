"""A chat completion read: its answers apart from their reasoning, how each ended, and tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from tpo.backends.reasoning import split_reasoning
from tpo.backends.remote.server import Malformed
from tpo.core.ports import Text
from tpo.core.state import FinishReason

_CHARACTERS_A_TOKEN = 4
"""For servers that count nothing."""

_BROKEN_OFF = frozenset({"abort", "error"})
"""What SGLang and proxies say of an answer that was stopped on their side: it is none."""

_CUT = frozenset({"length", "content_filter", "max_tokens"})


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
    """The answers of one request."""

    texts: tuple[Text, ...]
    input_tokens: int | None
    reasoning_tokens: int


def read_completion(answer: Any) -> Reply:
    """The answers in a chat completion's JSON. Raises Malformed."""
    try:
        completion = _Completion.model_validate(answer)
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_input=False)[0]["loc"]))
        raise Malformed(f"not with a chat completion ({where or 'no object'} is missing or wrong)") from None
    choices = [c for c in completion.choices if c.finish_reason not in _BROKEN_OFF]
    parts = [_parts(choice.message) for choice in choices]
    usage = completion.usage
    characters = [len(part) for pair in parts for part in pair]
    counted = usage.completion_tokens if usage and len(choices) == len(completion.choices) else 0
    tokens = _shared(counted, characters, _reasoned(usage) if counted else None)
    texts = [
        Text(text=text, finish_reason=_finish_reason(choice.finish_reason), tokens=tokens[2 * i])
        for i, (choice, (text, _)) in enumerate(zip(choices, parts, strict=True))
    ]
    return Reply(tuple(texts), usage.prompt_tokens if usage else None, sum(tokens[1::2]))


def estimated(characters: int) -> int:
    """Tokens of a text of that length, where nobody counted them."""
    return math.ceil(characters / _CHARACTERS_A_TOKEN)


def _parts(message: _Message) -> tuple[str, str]:
    content = message.content or ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content)
    apart = message.reasoning_content or message.reasoning
    if apart:
        return content.lstrip(), apart
    return split_reasoning(content)


def _finish_reason(said: str | None) -> FinishReason:
    """A filter cuts an answer off as a limit does: what is left of it is never taken for whole."""
    return "length" if said in _CUT else "stop"


def _reasoned(usage: _Usage | None) -> int | None:
    details = usage.completion_tokens_details if usage else None
    return details.reasoning_tokens if details else None


def _shared(counted: int, characters: Sequence[int], reasoned: int | None) -> list[int]:
    """Tokens of answers (even places) and their reasoning (odd ones).

    A server counts all answers of a request together; each has its share by length, so that the sum is exact.
    """
    if not counted:
        return [estimated(n) for n in characters]
    answers, reasoning = list(characters[::2]), list(characters[1::2])
    if reasoned is None:
        return _by_share(counted, characters)
    reasoned = min(reasoned, counted)
    pairs = zip(_by_share(counted - reasoned, answers), _by_share(reasoned, reasoning), strict=True)
    return [tokens for pair in pairs for tokens in pair]


def _by_share(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total`."""
    everything = sum(weights)
    if not everything:
        return [total if i == 0 else 0 for i in range(len(weights))]
    shares, given, passed = [], 0, 0
    for weight in weights:
        passed += weight
        share = round(total * passed / everything) - given
        shares.append(share)
        given += share
    return shares
