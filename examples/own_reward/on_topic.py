"""A reward of your own: the share of the message's longer words that the response uses."""

import re

from tpo.core.ports import Interrupt, Rewards, Score


class OnTopic:
    """Reward responses that use the words of the message."""

    def __init__(self, shortest: int) -> None:
        self._word = re.compile(rf"\w{{{shortest},}}")

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """Return a value from 0 to 1 for each response."""
        interrupt()  # raises if the job was cancelled; call it now and then in long work
        wanted = set(self._word.findall(request.messages[-1].content.lower()))
        found = [wanted & set(self._word.findall(response.lower())) for response in request.responses]
        return Rewards(values=tuple(len(each) / max(1, len(wanted)) for each in found), input_tokens=0, seconds=0.0)
