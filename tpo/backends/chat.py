"""Convert messages to tokens and tokens to text with the model's own chat template."""

import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from tpo.backends.messages import check_unicode
from tpo.backends.reasoning import THINK_CLOSE, THINK_OPEN
from tpo.core.errors import ModelRefusedError, PromptRefusedError
from tpo.core.state import Message

_PROBE = "probe"


class Chat:
    """One model's tokenizer. Thread-safe: a lock guards it, as Hugging Face's fast tokenizers are not thread-safe."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not tokenizer.chat_template:
            raise ModelRefusedError(
                f"{name} has no chat template, so its tokenizer cannot mark where a turn begins and ends. Use the "
                "model's chat or instruct variant, or add its chat_template.jinja to the folder."
            )
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        added = tokenizer.added_tokens_decoder.items()
        self._hidden = {i for i, token in added if token.special and token.content not in (THINK_OPEN, THINK_CLOSE)}
        try:
            self._render([Message(role="user", content=_PROBE)])
        except TemplateError as error:
            raise ModelRefusedError(
                f"{name}: its chat template refuses a conversation with a single user turn: {error}"
            ) from error
        self._folds_system = not self._accepts_system()

    def encode(self, messages: Sequence[Message], *, for_reply: bool) -> list[int]:
        """Return the conversation's token ids; `for_reply` opens the assistant's turn.

        Control tokens in the messages become ordinary text. Raises PromptRefusedError if the template refuses the
        messages, or if a text is not valid Unicode (half a surrogate pair).
        """
        check_unicode(messages)
        if self._folds_system:
            messages = _fold_system(messages)
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
        """Return generated text without special tokens. Other added tokens (answer tags) and thinking tags remain."""
        with self._lock:
            return str(self._tokenizer.decode([t for t in tokens if t not in self._hidden], skip_special_tokens=False))

    def count(self, text: str) -> int:
        """Return the number of tokens in a text, without the tokens of a chat turn."""
        with self._lock:
            return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def opens_thinking(self, prompt: Sequence[int]) -> bool:
        """Return whether the template has already opened the model's reasoning."""
        return self.decode(prompt[-8:]).rstrip().endswith(THINK_OPEN)

    def _accepts_system(self) -> bool:
        """Return whether the template accepts a system turn and renders its text."""
        system = "system-probe"
        try:
            text = self._render([Message(role="system", content=system), Message(role="user", content=_PROBE)])
        except TemplateError:
            return False
        return system in text

    def _render(self, messages: Sequence[Message]) -> str:
        turns = [m.model_dump() for m in messages]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """Move leading system turns into the first user turn, as its first paragraphs."""
    first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    if first == 0:
        return list(messages)
    texts = [m.content for m in messages[:first]]
    rest = list(messages[first:])
    if rest and rest[0].role == "user":
        texts.append(rest.pop(0).content)
    return [Message(role="user", content="\n\n".join(texts)), *rest]
