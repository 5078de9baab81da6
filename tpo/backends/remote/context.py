"""Recognise refusals for a request that is too long or has an unsupported `n`.

The patterns cover the error messages of vLLM, SGLang, llama.cpp and OpenAI.
"""

import re
from typing import NamedTuple

from tpo.backends.remote.server import Refused

_TOO_LONG = re.compile(
    r"context[_ ](?:length|size|window)|maximum model length|max_model_len|longer than the model|prompt is too long"
    r"|max_(?:completion_)?tokens\b.{0,60}(?:too large|must be at least 1)",
    re.IGNORECASE | re.DOTALL,
)
_WINDOW = re.compile(
    r"(?:context (?:length|size|window) (?:is|of|\()|maximum model length of|max_model_len\D{0,5}|n_ctx\D{0,5}"
    r"|supports at most) ?(\d+)",
    re.IGNORECASE,
)
_SENT_TOKENS = re.compile(
    r"(\d+) in the messages|(?:has|contains) (\d+) input tokens|(\d+) tokens from the input|resulted in (\d+) tokens"
    r"|n_prompt_tokens\D{0,5}(\d+)|(?:prompt|input) \((?:length )?(\d+)",
    re.IGNORECASE,
)
_PROMPT_TOO_LONG = re.compile(r"without any output tokens|characters \(more than", re.IGNORECASE)
_UNSUPPORTED_N = re.compile(r"\bn['\"`]?\s*:?\s+(?:value |number )?must be\b", re.IGNORECASE)
_TOO_LONG_CODES = ("context_length_exceeded", "exceed_context_size_error")
_REFUSALS = frozenset({400, 413, 422})


class TooLong(NamedTuple):
    """The model's window and the length of the request, in tokens; None where the server gave no exact number.

    `prompt_only`: the prompt does not fit by itself, even without any output tokens.
    """

    window: int | None
    sent: int | None
    prompt_only: bool = False


def too_long(refused: Refused) -> TooLong | None:
    """Return the lengths in a refusal for length; None if the request was refused for another reason."""
    if refused.status not in _REFUSALS:
        return None
    if not any(code in refused.code for code in _TOO_LONG_CODES) and not _TOO_LONG.search(refused.message):
        return None
    window = _WINDOW.search(refused.message)
    # vLLM's "at least" is not a count: vLLM stops reading where max_tokens would no longer fit.
    sent = _SENT_TOKENS.search(refused.message)
    return TooLong(
        int(window.group(1)) if window else None,
        next((int(number) for number in sent.groups() if number), None) if sent else None,
        bool(_PROMPT_TOO_LONG.search(refused.message)),
    )


def refuses_n(refused: Refused) -> bool:
    """Return whether `n` was refused: llama.cpp accepts at most its number of slots, other servers only 1."""
    return refused.status in _REFUSALS and bool(_UNSUPPORTED_N.search(refused.message))
