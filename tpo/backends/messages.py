"""Checks of messages before they are sent to a model."""

import re
from collections.abc import Iterable

from tpo.core.errors import PromptRefusedError
from tpo.core.state import Message

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_unicode(messages: Iterable[Message]) -> None:
    """Check that all texts are valid Unicode. Raises PromptRefusedError for half a surrogate pair."""
    if any(_LONE_SURROGATE.search(message.content) for message in messages):
        raise PromptRefusedError("A message contains half a surrogate pair, which is not valid Unicode text.")
