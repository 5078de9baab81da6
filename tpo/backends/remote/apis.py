"""Scoring APIs of reward model servers: `/classify` and `/pooling` of vLLM, `/classify` of SGLang."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tpo.backends.remote.server import Malformed
from tpo.core.errors import ModelRefusedError
from tpo.core.state import Message

_LABELS = "gives {} numbers for a response. A reward model must have exactly one label; its raw score is the reward."


class Scored(NamedTuple):
    """The score of one conversation, and the number of tokens read for it."""

    value: float
    tokens: int


class ScoringApi(Protocol):
    """Request and reply format of one kind of server."""

    path: str

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """Build the request for one conversation."""
        ...

    def read(self, reply: Any) -> Scored:
        """Read the score from the reply.

        Raises Malformed if the reply holds none, ModelRefusedError if it holds several numbers.
        """
        ...


class VllmClassify:
    """`POST /classify` with the messages; the server applies the model's chat template, with one BOS token."""

    path = "classify"

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """Build the request for one conversation."""
        return {"model": model, "messages": [m.model_dump() for m in turns], "use_activation": False}

    def read(self, reply: Any) -> Scored:
        """Read the score from the reply.

        Raises Malformed if the reply holds none, ModelRefusedError if it holds several numbers.
        """
        try:
            return Scored(_single_score(reply["data"][0]["probs"]), _count(reply["usage"]["prompt_tokens"]))
        except (TypeError, KeyError, IndexError, ValueError):
            raise Malformed("not with a classification") from None


class VllmPooling(VllmClassify):
    """`POST /pooling`: the numbers of one conversation.

    A model that returns numbers for each token is read at its last token.
    """

    path = "pooling"

    def __init__(self, task: str = "classify") -> None:
        self._task = task

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """Build the request for one conversation."""
        return {**super().body(model, turns), "task": self._task, "encoding_format": "float"}

    def read(self, reply: Any) -> Scored:
        """Read the score from the reply.

        Raises Malformed if the reply holds none, ModelRefusedError if it holds several numbers.
        """
        try:
            data = reply["data"][0]["data"]
            numbers = data[-1] if isinstance(data[-1], list) else data
            return Scored(_single_score(numbers), _count(reply["usage"]["prompt_tokens"]))
        except (TypeError, KeyError, IndexError, ValueError):
            raise Malformed("not with the reply of a pooling model") from None


class SglangClassify:
    """`POST /classify` with token ids encoded here by the chat template.

    There is exactly one BOS token, and no text turns into control tokens.
    """

    path = "classify"

    def __init__(self, chat: Any) -> None:
        self._chat = chat

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """Build the request for one conversation."""
        return {"model": model, "input_ids": self._chat.encode(turns, for_reply=False)}

    def read(self, reply: Any) -> Scored:
        """Read the score from the reply.

        Raises Malformed if the reply holds none, ModelRefusedError if it holds several numbers.
        """
        try:
            found = reply[0] if isinstance(reply, list) else reply
            return Scored(_single_score(found["embedding"]), _count(found.get("meta_info", {}).get("prompt_tokens", 0)))
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            raise Malformed("not with a score") from None


def _single_score(numbers: Any) -> float:
    """Return the single raw score. Raises ModelRefusedError if there is not exactly one number."""
    values = [float(number) for number in numbers]
    if len(values) != 1:
        raise ModelRefusedError(f"The reward model's server {_LABELS.format(len(values))}")
    return values[0]


def _count(number: Any) -> int:
    return max(0, int(number or 0))


def load_chat(name: str) -> Any:
    """Load the model's chat template and tokenizer, for a server that accepts only token ids.

    Raises ModelRefusedError if transformers is missing or the tokenizer cannot be loaded.
    """
    try:
        from transformers import AutoTokenizer

        from tpo.backends.chat import Chat
    except ImportError as error:
        raise ModelRefusedError(
            f"sglang: needs transformers for the tokenizer ({error}). Run: pip install transformers"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise ModelRefusedError(
            f"sglang: needs token ids, and the tokenizer {name} cannot be loaded here: {error} "
            "Set TPO_REWARD_TOKENIZER to a folder or a name on the Hugging Face Hub."
        ) from error
    return Chat(tokenizer, f"The reward model {name}")
