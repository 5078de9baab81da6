"""Each prompt shows the right text in the right slot; no score would reveal an error there."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from testing.fakes import FakePolicy, FakeReward, new_state, proceed
from tests.core.test_conformance import RUNS, THEIR_TAGS, replies
from tests.support.renderings import golden, rendering
from tpo.core import requests
from tpo.core.ports import Generate
from tpo.core.prompts import STEPS, PromptSet, Step, load, names
from tpo.core.run import run
from tpo.core.state import Message, State

Slots = list[tuple[str, str]]
TAGGED = re.compile(r"<(request|chosen_response|rejected_response|review|instructions)>\n(.*?)\n</\1>", re.DOTALL)
LINES = re.compile(r"^<(query|chosen|rejected|critique|suggestions)> (.*?)(?=\n<|\Z)", re.DOTALL | re.MULTILINE)
CHOSEN_FIRST = ("request", "chosen_response", "rejected_response")
REJECTED_FIRST = ("request", "rejected_response", "chosen_response")
ORDER: dict[str, dict[str, Sequence[str]]] = {
    "conversation": {
        "critique": CHOSEN_FIRST,
        "gradient": (*CHOSEN_FIRST, "review"),
        "update": (*CHOSEN_FIRST, "review", "instructions"),
    },
    "separate": {
        "critique": REJECTED_FIRST,
        "gradient": (*REJECTED_FIRST, "review"),
        "update": (*REJECTED_FIRST, "review", "instructions"),
    },
    "tiny": {
        "critique": ("query", "chosen", "rejected"),
        "gradient": ("critique",),
        "update": ("query", "chosen", "suggestions"),
    },
}
TEXT_OF_LABEL = {
    "request": "query",
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "review": "critique",
    "instructions": "gradient",
    "suggestions": "gradient",
}
"""Names of the texts whose label in the prompt differs."""


def slots(prompt_set: str, request: Generate) -> Slots:
    """Return the labelled texts of a prompt, in order.

    In a conversation, the turns of the policy count as its review and its instructions.
    """
    if prompt_set == "tiny":
        (message,) = request.messages
        return LINES.findall(message.content)
    found: Slots = []
    own = iter(("review", "instructions"))
    for message in request.messages:
        found += [(next(own), message.content)] if message.role == "assistant" else TAGGED.findall(message.content)
    return found


def recorded_texts(recorded: dict[str, Any], number: int, last: State) -> dict[str, str]:
    """Return the texts of one iteration of the recorded run."""
    critiques = [call for call in recorded["expect"]["calls"] if call["kind"] == "loss"]
    iteration, written = last.iterations[number - 1], recorded["replies"]["iterations"][number - 1]
    texts = {
        "query": recorded["query"],
        "chosen": critiques[number - 1]["chosen"],
        "critique": written["loss"].strip(),
        "gradient": written["gradient"].strip(),
    }
    if iteration.rejected not in (None, iteration.chosen):
        texts["rejected"] = critiques[number - 1]["rejected"]
    return texts


def misplaced_texts(number: int, prompts: PromptSet) -> list[tuple[Slots, Slots]]:
    """Repeat a recorded run. Return the texts of each wrong prompt, and those that it should show."""
    recorded = RUNS[number]
    state = new_state(
        recorded["query"],
        prompts.model_copy(update={"answer_tags": THEIR_TAGS}),
        mode=recorded["mode"],
        sample_size=recorded["n"],
        max_iterations=recorded["iterations"],
    )
    policy = FakePolicy(lambda request, sample: replies(recorded, request, sample))
    last = run(state, policy, FakeReward(recorded["rewards"].__getitem__), lambda _: None, proceed)
    prompted = [request for request in policy.requests if request.kind != "sample"]
    assert bool(prompted) == bool(last.iterations)
    wrong = []
    for request in prompted:
        texts = recorded_texts(recorded, request.iteration, last)
        labels = [label for label in ORDER[prompts.name][request.kind] if TEXT_OF_LABEL.get(label, label) in texts]
        shown = slots(prompts.name, request)
        expected = [(label, texts[TEXT_OF_LABEL.get(label, label)]) for label in labels]
        if shown != expected:
            wrong.append((shown, expected))
    return wrong


@pytest.mark.parametrize("prompt_set", names())
@pytest.mark.parametrize("number", range(len(RUNS)))
def test_prompt_slots_of_recorded_runs(number: int, prompt_set: str) -> None:
    assert misplaced_texts(number, load(prompt_set)) == []


def runs_that_differ(prompts: PromptSet) -> int:
    """Return how many recorded runs show a text in a wrong slot."""
    return sum(bool(misplaced_texts(number, prompts)) for number in range(len(RUNS)))


def swapped(prompts: PromptSet, *steps: Step) -> PromptSet:
    """Return the prompt set with the slots of the chosen and the rejected response exchanged in some templates."""
    other = {"$chosen": "$rejected", "$rejected": "$chosen"}
    templates: dict[str, str] = {
        step: re.sub(r"\$(chosen|rejected)\b", lambda found: other[found[0]], getattr(prompts.tpo, step))
        for step in steps
    }
    return prompts.model_copy(update={"tpo": prompts.tpo.model_copy(update=templates)})


@pytest.mark.parametrize(
    ("prompt_set", "step"),
    [("conversation", "critique"), *(("separate", step) for step in STEPS)],
)
def test_swapped_slots_are_detected(prompt_set: str, step: Step) -> None:
    """In `conversation`, only the critique's template has these slots: later turns repeat it."""
    prompts = swapped(load(prompt_set), step)
    assert prompts != load(prompt_set)
    assert runs_that_differ(prompts)


@pytest.mark.parametrize("prompt_set", names())
def test_outdated_critique_is_detected(prompt_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = requests._prompt

    def with_first_critique(state: State, number: int, step: Step) -> tuple[Message, ...]:
        if step != "gradient":
            return prompt(state, number, step)
        iteration = state.iteration(number).model_copy(update={"critique": state.iterations[0].critique})
        outdated = state.model_copy(update={"iterations": (*state.iterations[: number - 1], iteration)})
        return prompt(outdated, number, step)

    monkeypatch.setattr(requests, "_prompt", with_first_critique)
    assert runs_that_differ(load(prompt_set))


@pytest.mark.parametrize("name", names())
def test_rendering_matches_golden_file(name: str) -> None:
    assert rendering(name) == golden(name).read_text(encoding="utf-8"), (
        "run python -m tests.support.renderings to update it"
    )
