"""Each prompt shows the right text in the right slot; no score would reveal an error there."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from testing.fakes import FakePolicy, FakeReward, new_state, proceed
from tests.core.test_conformance import RUNS, THEIR_TAGS, replies
from tests.support.renderings import golden, rendering
from tpo.core.ports import Generate
from tpo.core.prompts import load, names
from tpo.core.run import run
from tpo.core.state import State

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


@pytest.mark.parametrize("prompt_set", names())
@pytest.mark.parametrize("number", range(len(RUNS)))
def test_prompt_slots_of_recorded_runs(number: int, prompt_set: str) -> None:
    recorded = RUNS[number]
    state = new_state(
        recorded["query"],
        load(prompt_set).model_copy(update={"answer_tags": THEIR_TAGS}),
        mode=recorded["mode"],
        sample_size=recorded["n"],
        max_iterations=recorded["iterations"],
    )
    policy = FakePolicy(lambda request, sample: replies(recorded, request, sample))
    last = run(state, policy, FakeReward(recorded["rewards"].__getitem__), lambda _: None, proceed)
    prompted = [request for request in policy.requests if request.kind != "sample"]
    assert bool(prompted) == bool(last.iterations)
    for request in prompted:
        texts = recorded_texts(recorded, request.iteration, last)
        labels = [label for label in ORDER[prompt_set][request.kind] if TEXT_OF_LABEL.get(label, label) in texts]
        assert slots(prompt_set, request) == [(label, texts[TEXT_OF_LABEL.get(label, label)]) for label in labels]


@pytest.mark.parametrize("name", names())
def test_rendering_matches_golden_file(name: str) -> None:
    assert rendering(name) == golden(name).read_text(encoding="utf-8"), (
        "run python -m tests.support.renderings to update it"
    )
