"""What a server says when a request does not fit its model, in the words of vLLM, SGLang, llama.cpp and OpenAI.

And what it says where it takes no such n.
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
_SENT = re.compile(
    r"(\d+) in the messages|(?:has|contains) (\d+) input tokens|(\d+) tokens from the input|resulted in (\d+) tokens"
    r"|n_prompt_tokens\D{0,5}(\d+)|(?:prompt|input) \((?:length )?(\d+)",
    re.IGNORECASE,
)
_ALONE = re.compile(r"without any output tokens|characters \(more than", re.IGNORECASE)
_OTHER_N = re.compile(r"\bn['\"`]?\s*:?\s+(?:value |number )?must be\b", re.IGNORECASE)
_TOO_LONG_CODES = ("context_length_exceeded", "exceed_context_size_error")
_REFUSALS = frozenset({400, 413, 422})


class TooLong(NamedTuple):
    """The model's window and the length of what was sent, in tokens, as far as the server said exactly.

    `alone`: it said that the prompt does not fit by itself, whatever is left for an answer.
    """

    window: int | None
    sent: int | None
    alone: bool = False


def too_long(refused: Refused) -> TooLong | None:
    """What does not fit; None where it was refused for another reason."""
    if refused.status not in _REFUSALS:
        return None
    if not any(code in refused.code for code in _TOO_LONG_CODES) and not _TOO_LONG.search(refused.said):
        return None
    window = _WINDOW.search(refused.said)
    # vLLM's "at least" is no count: it stops to read where max_tokens would not fit any more.
    sent = _SENT.search(refused.said)
    return TooLong(
        int(window.group(1)) if window else None,
        next((int(number) for number in sent.groups() if number), None) if sent else None,
        bool(_ALONE.search(refused.said)),
    )


def refuses_n(refused: Refused) -> bool:
    """Whether it is the n that does not fit: llama.cpp takes no more than it has slots, others take 1 alone."""
    return refused.status in _REFUSALS and bool(_OTHER_N.search(refused.said))
