"""Conformance with the authors' code: the same choices as in its recorded runs with scripted replies and rewards.

TPO_TRAJECTORIES may name another file of the same format.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from testing.fakes import FakePolicy, FakeReward, new_state, proceed, sample_text
from tpo.core.ports import Generate, Text
from tpo.core.prompts import load, names
from tpo.core.run import run

FILE = Path(os.environ.get("TPO_TRAJECTORIES") or Path(__file__).parent.parent / "data" / "trajectories.json")
RUNS: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
RECORDED_KIND = {"critique": "loss"}
"""Kinds of calls that have another name in the recorded runs."""
THEIR_TAGS = ("<IMPROVED_VARIABLE>", "</IMPROVED_VARIABLE>")


def replies(recorded: dict[str, Any], request: Generate, sample: int) -> Text:
    """Return the recorded text of the policy. A repeated request for a step gets the same text again."""
    if request.kind == "sample":
        return sample_text(recorded["replies"]["sample"][sample % request.n])
    reply = recorded["replies"]["iterations"][request.iteration - 1][RECORDED_KIND.get(request.kind, request.kind)]
    return sample_text(reply[sample % request.n] if request.kind == "update" else reply)


def test_recorded_runs_exist() -> None:
    assert len(RUNS) >= 1
    assert "TPO_TRAJECTORIES" in os.environ or len(RUNS) == 60


@pytest.mark.parametrize("prompt_set", names())
@pytest.mark.parametrize("number", range(len(RUNS)))
def test_run_makes_recorded_choices(number: int, prompt_set: str) -> None:
    recorded = RUNS[number]
    prompts = load(prompt_set).model_copy(update={"answer_tags": THEIR_TAGS})
    state = new_state(
        recorded["query"],
        prompts,
        mode=recorded["mode"],
        sample_size=recorded["n"],
        max_iterations=recorded["iterations"],
    )
    policy = FakePolicy(lambda request, sample: replies(recorded, request, sample))
    reward = FakeReward(recorded["rewards"].__getitem__)
    last = run(state, policy, reward, lambda _: None, proceed)

    # When no sample of a step is usable, this implementation asks once more and the authors' code does not. The
    # repeated request makes no other choice, so it is left out.
    requests = [r for r in policy.requests if r.first_sample == 0]
    assert [(RECORDED_KIND.get(r.kind, r.kind), r.n) for r in requests] == [
        (c["kind"], c["n"]) for c in recorded["expect"]["calls"]
    ]
    compared = [c for c in recorded["expect"]["calls"] if c["kind"] == "loss"]
    critiques = [r for r in requests if r.kind == "critique"]
    for iteration, expected, critique in zip(last.iterations, compared, critiques, strict=True):
        rejected = iteration.rejected and last.candidate(iteration.rejected).text
        assert (last.candidate(iteration.chosen).text, rejected) == (expected["chosen"], expected["rejected"])
        shown = critique.messages[-1].content
        assert all(text in shown for text in (expected["chosen"], expected["rejected"] or ""))
    assert [list(request.responses) for request in reward.requests] == recorded["expect"]["scored"]
    assert last.best is not None
    assert (last.best.text, last.best.reward) == (recorded["expect"]["best"], recorded["expect"]["best_score"])
