"""How each kind of server is asked for the score of a conversation: vLLM's `/classify` and `/pooling`, SGLang's."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tpo.backends.remote.server import Malformed
from tpo.core.errors import ModelRefusedError
from tpo.core.state import Message

_LABELS = "gives {} numbers for a response. A reward model here has one label, whose raw score is the reward."


class Scored(NamedTuple):
    """The score of one conversation, and the tokens that were read for it."""

    value: float
    tokens: int


class ScoringApi(Protocol):
    """How one kind of server is asked."""

    path: str

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """The request for one conversation."""
        ...

    def read(self, answer: Any) -> Scored:
        """The score in the answer. Raises Malformed, ModelRefusedError."""
        ...


class VllmClassify:
    """`POST /classify` with the conversation: the server writes it in the model's chat template, with one BOS."""

    path = "classify"

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """The request for one conversation."""
        return {"model": model, "messages": [m.model_dump() for m in turns], "use_activation": False}

    def read(self, answer: Any) -> Scored:
        """The score in the answer. Raises Malformed, ModelRefusedError."""
        try:
            return Scored(_one(answer["data"][0]["probs"]), _count(answer["usage"]["prompt_tokens"]))
        except (TypeError, KeyError, IndexError, ValueError):
            raise Malformed("not with a classification") from None


class VllmPooling(VllmClassify):
    """`POST /pooling`: the numbers of one conversation, or, of a model that gives some for each token, of its last."""

    path = "pooling"

    def __init__(self, task: str = "classify") -> None:
        self._task = task

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """The request for one conversation."""
        return {**super().body(model, turns), "task": self._task, "encoding_format": "float"}

    def read(self, answer: Any) -> Scored:
        """The score in the answer. Raises Malformed, ModelRefusedError."""
        try:
            data = answer["data"][0]["data"]
            numbers = data[-1] if isinstance(data[-1], list) else data
            return Scored(_one(numbers), _count(answer["usage"]["prompt_tokens"]))
        except (TypeError, KeyError, IndexError, ValueError):
            raise Malformed("not with what a pooling model gives") from None


class SglangClassify:
    """`POST /classify` with the template's own token ids: one BOS, and no text becomes control tokens."""

    path = "classify"

    def __init__(self, chat: Any) -> None:
        self._chat = chat

    def body(self, model: str, turns: Sequence[Message]) -> dict[str, Any]:
        """The request for one conversation."""
        return {"model": model, "input_ids": self._chat.encode(turns, for_reply=False)}

    def read(self, answer: Any) -> Scored:
        """The score in the answer. Raises Malformed, ModelRefusedError."""
        try:
            found = answer[0] if isinstance(answer, list) else answer
            return Scored(_one(found["embedding"]), _count(found.get("meta_info", {}).get("prompt_tokens", 0)))
        except (TypeError, KeyError, IndexError, ValueError, AttributeError):
            raise Malformed("not with a score") from None


def _one(numbers: Any) -> float:
    """The single raw score. Raises ModelRefusedError where there are several."""
    values = [float(number) for number in numbers]
    if len(values) != 1:
        raise ModelRefusedError(f"The reward model's server {_LABELS.format(len(values))}")
    return values[0]


def _count(number: Any) -> int:
    return max(0, int(number or 0))


def load_chat(name: str) -> Any:
    """The model's chat template and tokenizer, for a server that takes none but finished tokens."""
    try:
        from transformers import AutoTokenizer

        from tpo.backends.chat import Chat
    except ImportError as error:
        raise ModelRefusedError(
            f"sglang: needs transformers for the tokenizer ({error}): pip install transformers"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise ModelRefusedError(
            f"sglang: takes finished tokens, and the tokenizer {name} cannot be loaded here: {error} "
            "TPO_REWARD_TOKENIZER names a folder or a name on the Hugging Face Hub."
        ) from error
    return Chat(tokenizer, f"The reward model {name}")
