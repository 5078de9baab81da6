"""Build the request of a model call: prompts, seeds and sampling parameters."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from tpo.core.ports import Generate, Score
from tpo.core.prompts import Step as PromptStep
from tpo.core.state import CallKind, Candidate, Message, PolicyCall, State

SHOWN_TOKENS = 2048
"""Prompts show at most this much of a candidate. A longer one is cut in prompts, never in the pool."""

_CUT_MARK = " […]"
_NAME_IN_SEED: dict[CallKind, str] = {"critique": "loss"}
"""Names from which seeds are derived. They never change, or recorded runs, such as the demo's, would not repeat."""


class NextCall(NamedTuple):
    """A model call, identified by its place in the run: `n` samples from number `first` on."""

    kind: CallKind
    iteration: int
    first: int = 0
    n: int = 1


def build_request(state: State, call: NextCall) -> Generate | Score:
    """Build the request of a call: render its prompt and derive its seeds, or collect the responses to score."""
    if call.kind == "score":
        return Score(
            iteration=call.iteration,
            messages=state.input,
            responses=tuple(c.text for c in state.unscored(call.iteration)),
        )
    params = state.params
    is_note = call.kind in ("critique", "gradient")
    return Generate(
        kind=call.kind,
        iteration=call.iteration,
        first_sample=call.first,
        messages=state.input if call.kind == "sample" else _prompt(state, call.iteration, call.kind),
        seeds=_seeds(params.seed, call, call.kind),
        temperature=params.critique_temperature if is_note else params.temperature,
        top_p=params.critique_top_p if is_note else params.top_p,
        max_tokens=params.critique_max_tokens if is_note else params.max_tokens,
        stop=params.stop if call.kind == "sample" else (),
    )


def derived_seed(job_seed: int, iteration: int, kind: CallKind, sample: int) -> int:
    """Derive a sample's seed: 63 bits of a hash, so that runs repeat and no two samples share a random stream."""
    name = f"{job_seed}/{iteration}/{_NAME_IN_SEED.get(kind, kind)}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1


def query_text(messages: Sequence[Message]) -> str:
    """Render the conversation for the critic: a single message as it is, otherwise each turn under its role's name."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"[{m.role}]\n{m.content}" for m in messages)


def _seeds(job_seed: int, call: NextCall, kind: PolicyCall) -> tuple[int, ...]:
    return tuple(derived_seed(job_seed, call.iteration, kind, call.first + i) for i in range(call.n))


def _prompt(state: State, number: int, step: PromptStep) -> tuple[Message, ...]:
    iteration = state.iteration(number)
    texts = {"query": query_text(state.input), "chosen": _shown(state.candidate(iteration.chosen))}
    # With equal rewards, the same candidate is both chosen and rejected: there is nothing to compare it with.
    if iteration.rejected is not None and iteration.rejected != iteration.chosen:
        texts["rejected"] = _shown(state.candidate(iteration.rejected))
    if iteration.critique:
        texts["critique"] = iteration.critique.text
    if iteration.gradient:
        texts["gradient"] = iteration.gradient.text
    return tuple(Message(role=role, content=content) for role, content in state.prompts.render(step, texts))


def _shown(candidate: Candidate) -> str:
    """Return a candidate's text as prompts show it: whole, or cut in proportion to the tokens that are allowed."""
    if candidate.tokens <= SHOWN_TOKENS:
        return candidate.text
    return candidate.text[: len(candidate.text) * SHOWN_TOKENS // candidate.tokens] + _CUT_MARK
