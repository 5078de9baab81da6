"""A policy and a reward model that answer from the request alone and remember what they were asked."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tpo.core.loop import Step, pending
from tpo.core.ports import Generate, Generation, Interrupt, Rewards, Score, Text
from tpo.core.prompts import PromptSet, load
from tpo.core.run import run
from tpo.core.state import Message, Params, RewardPart, State

Answer = Callable[[Generate, int], Text]
Value = Callable[[str], float]
Parts = Callable[[str], tuple[RewardPart, ...]]


def new_state(query: str = "Where is my parcel?", prompts: PromptSet | None = None, **params: Any) -> State:
    """A job before its first call."""
    return State(
        input=(Message(role="user", content=query),), params=Params(**params), prompts=prompts or load("conversation")
    )


def said(text: str, finish_reason: Any = "stop", tokens: int | None = None) -> Text:
    """One response of the policy."""
    return Text(text=text, finish_reason=finish_reason, tokens=len(text.split()) if tokens is None else tokens)


def tagged(text: str, prompts: PromptSet | None = None) -> str:
    """An update's answer between its tags."""
    opening, closing = (prompts or load("conversation")).answer_tags
    return f"{opening}{text}{closing}"


def plain(request: Generate, sample: int) -> Text:
    """A different text for each seed, in its tags where they are asked for."""
    text = f"{request.kind} {request.iteration}-{sample} of seed {request.seeds[sample - request.first_sample]}"
    return said(tagged(text) if request.kind == "update" else text)


def by_length_and_letters(text: str) -> float:
    """A reward that differs from text to text and is the same each time."""
    return sum(map(ord, text)) % 997 / 100


class FakePolicy:
    """Answers each sample of a request by a function of the request and the sample's number."""

    def __init__(self, answer: Answer = plain) -> None:
        self._answer = answer
        self.asked: list[Generate] = []

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        """One response for each seed."""
        self.asked.append(request)
        samples = range(request.first_sample, request.first_sample + request.n)
        read = sum(len(m.content.split()) for m in request.messages)
        return Generation(texts=tuple(self._answer(request, s) for s in samples), input_tokens=read, seconds=0.25)


class FakeReward:
    """Scores each response by a function of its text."""

    def __init__(self, value: Value = by_length_and_letters, parts: Parts | None = None) -> None:
        self._value = value
        self._parts = parts
        self.asked: list[Score] = []

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        """One value for each response."""
        self.asked.append(request)
        parts = tuple(map(self._parts, request.responses)) if self._parts else ()
        return Rewards(values=tuple(map(self._value, request.responses)), input_tokens=7, seconds=0.125, parts=parts)


def go_on() -> None:
    """An interrupt that never comes."""


def make_step(state: State, policy: FakePolicy | None = None, reward: FakeReward | None = None) -> Step:
    """Make the next model call of a run. The run must not have ended."""
    made: list[Step] = []

    def stop(step: Step) -> None:
        made.append(step)
        raise _OneStepError

    with suppress(_OneStepError):
        run(state, policy or FakePolicy(), reward or FakeReward(), stop, go_on)
    return made[0]


def step(state: State, policy: FakePolicy | None = None, reward: FakeReward | None = None) -> State:
    """Return the state after one more model call; the same state if nothing is pending."""
    return state if pending(state) is None else make_step(state, policy, reward).after


class _OneStepError(Exception):
    """Ends a run after one step."""
