"""Messages to tokens and tokens to text, by the model's own chat template."""

import re
import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from tpo.backends.reasoning import THINK_CLOSE, THINK_OPEN
from tpo.core.errors import ModelRefusedError, PromptRefusedError
from tpo.core.state import Message

_PROBE = "probe"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Chat:
    """One model's tokenizer. Any thread may call; Hugging Face's fast tokenizers may not be used by two at once."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not tokenizer.chat_template:
            raise ModelRefusedError(
                f"{name} has no chat template: its tokenizer cannot say where a turn begins and ends. Take the model's "
                "chat or instruct variant, or add its chat_template.jinja to the folder."
            )
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        added = tokenizer.added_tokens_decoder.items()
        self._hidden = {i for i, token in added if token.special and token.content not in (THINK_OPEN, THINK_CLOSE)}
        try:
            self._render([Message(role="user", content=_PROBE)])
        except TemplateError as error:
            raise ModelRefusedError(
                f"{name}: its chat template refuses a conversation of one user's turn: {error}"
            ) from error
        self._folds_system = not self._takes_system()

    def encode(self, messages: Sequence[Message], *, for_reply: bool) -> list[int]:
        """The conversation's token ids; `for_reply` opens the assistant's turn.

        Control tokens in the messages become ordinary text. Raises PromptRefusedError where the template does, and for
        text that is not Unicode (half a surrogate pair).
        """
        if any(_LONE_SURROGATE.search(m.content) for m in messages):
            raise PromptRefusedError("A message holds half a surrogate pair, which is no Unicode text.")
        if self._folds_system:
            messages = _folded(messages)
        try:
            with self._lock:
                encoded = self._tokenizer.apply_chat_template(
                    [m.model_dump() for m in messages],
                    add_generation_prompt=for_reply,
                    tokenize=True,
                    return_dict=True,
                    sanitize_control_tokens=True,
                )
        except TemplateError as error:
            roles = ", ".join(m.role for m in messages)
            raise PromptRefusedError(f"The model's chat template refuses the turns ({roles}): {error}") from error
        return list(encoded["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Generated text: special tokens are left out; other added ones (answer tags) and thinking stay."""
        with self._lock:
            return str(self._tokenizer.decode([t for t in tokens if t not in self._hidden], skip_special_tokens=False))

    def count(self, text: str) -> int:
        """How many tokens a text has, without any turn around it."""
        with self._lock:
            return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def opens_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether the template has begun the model's reasoning for it."""
        return self.decode(prompt[-8:]).rstrip().endswith(THINK_OPEN)

    def _takes_system(self) -> bool:
        system = "system-probe"
        try:
            text = self._render([Message(role="system", content=system), Message(role="user", content=_PROBE)])
        except TemplateError:
            return False
        return system in text

    def _render(self, messages: Sequence[Message]) -> str:
        turns = [m.model_dump() for m in messages]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _folded(messages: Sequence[Message]) -> list[Message]:
    """System turns at the front become the first paragraphs of the first user's turn."""
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    if first == 0:
        return list(messages)
    texts = [m.content for m in messages[:first]]
    rest = list(messages[first:])
    if rest and rest[0].role == "user":
        texts.append(rest.pop(0).content)
    return [Message(role="user", content="\n\n".join(texts)), *rest]
