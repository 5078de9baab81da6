"""The algorithm: what is next, and what a reply changes. Pure: no I/O, no clock, no randomness of its own.

Li et al., "Test-Time Preference Optimization", ICML 2025, arXiv 2501.12895, section 4. Where the authors' code lets
an edge through (an empty pair of tags, a NaN reward, one seed for every iteration), the rule is stated here.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tpo.core.errors import BadReply, NoUsableSample
from tpo.core.ports import Generate, Generation, Rewards, Score, Text
from tpo.core.prompts import Step
from tpo.core.state import (
    Budget,
    Call,
    CallKind,
    Candidate,
    FinishReason,
    GivenUp,
    Iteration,
    Message,
    Note,
    PolicyCall,
    RewardPart,
    State,
    Unusable,
)
from tpo.core.stopping import given_up, used_up

SHOWN_TOKENS = 2048
"""A longer response is cut when it is shown to the critic (never in the pool)."""

_CUT_MARK = " […]"

Phase = Literal["sampling", "scoring", "critique", "gradient", "update"]
_PHASES: dict[CallKind, Phase] = {
    "sample": "sampling",
    "score": "scoring",
    "loss": "critique",
    "gradient": "gradient",
    "update": "update",
}


class Standing(NamedTuple):
    """Where a state stands."""

    iteration: int
    """The one that is worked on, or the last one that was."""
    phase: Phase | None
    """What comes next in it; None where nothing does."""
    complete: int
    """How many iterations are complete, the first sampling counted as one."""
    stopped: Budget | GivenUp | None = None
    """Why nothing comes next although iterations are left."""


def pending(state: State) -> Generate | Score | None:
    """The next model call, or None when the output stands. Reads nothing but the data.

    Raises NoUsableSample when two rounds of first samples gave nothing that can be scored.
    """
    ask = _place(state).ask
    if ask is None:
        return None
    if ask.kind == "score":
        responses = tuple(c.text for c in state.candidates if _wants_score(c, ask.iteration))
        return Score(iteration=ask.iteration, messages=state.input, responses=responses)
    return _generate(state, ask.iteration, ask.kind, ask.first, ask.n)


def standing(state: State) -> Standing:
    """Which iteration and phase comes next, in the API's words. Makes no prompt, so that it costs little."""
    try:
        place = _place(state)
    except NoUsableSample:
        # The run that meets it next fails; what led to it is recorded like any other step.
        return Standing(0, None, complete=1)
    if place.ask:
        return Standing(place.iteration, _PHASES[place.ask.kind], complete=place.iteration)
    begun = place.iteration <= len(state.iterations)
    return Standing(place.iteration if begun else place.iteration - 1, None, place.iteration, place.stopped)


def with_texts(state: State, generation: Generation) -> State:
    """The state after the policy's reply to the pending request. Raises BadReply when texts are missing."""
    request = pending(state)
    if not isinstance(request, Generate):
        raise BadReply("The policy replied, but nothing was asked of it.")
    if len(generation.texts) != request.n:
        raise BadReply(f"The policy was asked for {request.n} responses and gave {len(generation.texts)}.")
    texts = [t.model_copy(update={"text": _storable(t.text)}) for t in generation.texts]
    state = _with_call(
        state,
        request.kind,
        request.iteration,
        request.n,
        generation.input_tokens,
        sum(t.tokens for t in texts) + generation.reasoning_tokens,
        generation.seconds,
    )
    if request.kind == "loss" or request.kind == "gradient":
        # Cut off at its limit it is asked for once more, like a blank one; a second one is taken as it is.
        cut = texts[0].finish_reason == "length" and request.first_sample == 0
        note = Note(text="" if cut else texts[0].text.strip(), attempt=request.first_sample)
        return _with_note(state, request.iteration, request.kind, note)
    new = [_candidate(state, request, request.first_sample + i, text) for i, text in enumerate(texts)]
    return state.model_copy(update={"candidates": (*state.candidates, *new)})


def with_scores(state: State, rewards: Rewards) -> State:
    """The state after the reward model's reply. A reward that is not finite makes its response unusable, never best."""
    request = pending(state)
    if not isinstance(request, Score):
        raise BadReply("The reward model replied, but nothing was asked of it.")
    if len(rewards.values) != len(request.responses):
        raise BadReply(
            f"The reward model was given {len(request.responses)} responses and gave {len(rewards.values)} scores."
        )
    parts = rewards.parts or ((),) * len(rewards.values)
    if len(parts) != len(rewards.values):
        raise BadReply(f"The reward model gave {len(rewards.values)} scores, and the parts of {len(parts)}.")
    state = _with_call(state, "score", request.iteration, len(rewards.values), rewards.input_tokens, 0, rewards.seconds)
    scores = iter(zip(rewards.values, parts, strict=True))
    candidates = [_scored(c, *next(scores)) if _wants_score(c, request.iteration) else c for c in state.candidates]
    return state.model_copy(update={"candidates": tuple(candidates)})


def derived_seed(job_seed: int, iteration: int, kind: CallKind, sample: int) -> int:
    """A request's own seed: 63 bits of a hash, so that a run repeats and no two requests share a stream."""
    name = f"{job_seed}/{iteration}/{kind}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1


def query_text(messages: Sequence[Message]) -> str:
    """The conversation as the critic sees it: a single user's turn as it is, else each turn under its role's name."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"[{m.role}]\n{m.content}" for m in messages)


class _Ask(NamedTuple):
    """A model call by its place: the requested samples are those from `first` on."""

    kind: CallKind
    iteration: int
    first: int = 0
    n: int = 1


class _Place(NamedTuple):
    """The first iteration that is not complete, and the call that it needs, or why there is none."""

    iteration: int
    ask: _Ask | None
    stopped: Budget | GivenUp | None = None


def _place(state: State) -> _Place:
    """How far the state is. Raises NoUsableSample."""
    for number in range(state.params.iterations + 1):
        begun = number <= len(state.iterations)
        if not begun and (reason := given_up(state, number - 1)):
            return _Place(number, None, reason)
        ask = _due(state, number)
        spent = used_up(state) if ask and ask.kind != "score" else None
        if number == 0 and not state.pool and (ask is None or spent):
            raise NoUsableSample(_why_none(state, spent))
        if ask:
            return _Place(number, None if spent else ask, spent)
    return _Place(state.params.iterations + 1, None)


def _due(state: State, number: int) -> _Ask | None:
    """The next call of one iteration; None where it is complete."""
    if number and (ask := _due_note(state, number)):
        return ask
    if number and not _has_notes(state, number):
        return None
    return _due_candidates(state, number)


def _due_candidates(state: State, number: int) -> _Ask | None:
    """Samples of one step, then their scores; once more with fresh seeds where all of a round is unusable."""
    candidates = list(state.of_iteration(number))
    n = state.params.sample_size
    if not candidates or (len(candidates) == n and all(c.unusable for c in candidates)):
        return _Ask("update" if number else "sample", number, len(candidates), n)
    return _Ask("score", number) if any(_wants_score(c, number) for c in candidates) else None


def _due_note(state: State, number: int) -> _Ask | None:
    """The textual loss or gradient of one iteration, asked for a second time where the first is blank."""
    iteration = _iteration(state, number)
    notes: tuple[tuple[Step, Note | None], ...] = (("loss", iteration.loss), ("gradient", iteration.gradient))
    for kind, note in notes:
        if note is None:
            return _Ask(kind, number)
        if not note.text:
            return _Ask(kind, number, first=1) if note.attempt == 0 else None
    return None


def _has_notes(state: State, number: int) -> bool:
    iteration = _iteration(state, number)
    return bool(iteration.loss and iteration.loss.text and iteration.gradient and iteration.gradient.text)


def _generate(state: State, number: int, kind: PolicyCall, first: int, n: int) -> Generate:
    params = state.params
    writes_note = kind in ("loss", "gradient")
    return Generate(
        kind=kind,
        iteration=number,
        first_sample=first,
        messages=state.input if kind == "sample" else _prompt(state, number, kind),
        seeds=tuple(derived_seed(params.seed, number, kind, sample) for sample in range(first, first + n)),
        temperature=params.critique_temperature if writes_note else params.temperature,
        top_p=params.critique_top_p if writes_note else params.top_p,
        max_tokens=params.critique_max_tokens if writes_note else params.max_tokens,
        stop=params.stop if kind == "sample" else (),
    )


def _prompt(state: State, number: int, step: Step) -> tuple[Message, ...]:
    iteration = _iteration(state, number)
    texts = {"query": query_text(state.input), "chosen": _shown(state.candidate(iteration.chosen))}
    # A pool in which everything scored the same has one response for both parts: nothing to compare it with.
    if iteration.rejected is not None and iteration.rejected != iteration.chosen:
        texts["rejected"] = _shown(state.candidate(iteration.rejected))
    if iteration.loss:
        texts["loss"] = iteration.loss.text
    if iteration.gradient:
        texts["gradient"] = iteration.gradient.text
    return tuple(Message(role=role, content=content) for role, content in state.prompts.render(step, texts))


def _shown(candidate: Candidate) -> str:
    """The response as the critic sees it: whole, or its first part by the share of tokens that is allowed."""
    if candidate.tokens <= SHOWN_TOKENS:
        return candidate.text
    return candidate.text[: len(candidate.text) * SHOWN_TOKENS // candidate.tokens] + _CUT_MARK


def _iteration(state: State, number: int) -> Iteration:
    """The record of an iteration: the one that was begun, or whom it would compare now."""
    if number <= len(state.iterations):
        return state.iterations[number - 1]
    best, worst = state.best, state.worst
    if best is None or worst is None:
        raise NoUsableSample()
    return Iteration(number=number, chosen=best.id, rejected=worst.id if state.params.mode == "tpo" else None)


def _candidate(state: State, request: Generate, sample: int, text: Text) -> Candidate:
    answer, unusable = _answer(state, request.kind, text.text, text.finish_reason)
    return Candidate(iteration=request.iteration, sample=sample, text=answer, tokens=text.tokens, unusable=unusable)


def _answer(state: State, kind: CallKind, reply: str, finish_reason: FinishReason) -> tuple[str, Unusable | None]:
    """The answer in a reply, or the reply as it is and why there is none in it."""
    if not reply.strip():
        return "", "cut_off" if finish_reason == "length" else "empty"
    if kind == "sample":
        return reply.strip(), "cut_off" if finish_reason == "length" else None
    if finish_reason == "length" and state.prompts.is_unfinished(reply):
        return reply, "cut_off"
    if answer := state.prompts.extract(reply):
        return answer, None
    return reply, "cut_off" if finish_reason == "length" else "no_answer_tags"


def _wants_score(candidate: Candidate, iteration: int) -> bool:
    return candidate.iteration == iteration and candidate.reward is None and candidate.unusable is None


def _scored(candidate: Candidate, value: float, parts: tuple[RewardPart, ...]) -> Candidate:
    update = {"reward": value} if math.isfinite(value) else {"unusable": "reward_not_finite"}
    # JSON has no NaN.
    kept = tuple(
        p if p.value is None or math.isfinite(p.value) else p.model_copy(update={"value": None}) for p in parts
    )
    return candidate.model_copy(update={**update, "parts": kept})


def _with_call(state: State, kind: CallKind, iteration: int, n: int, read: int, written: int, seconds: float) -> State:
    call = Call(
        number=len(state.calls) + 1,
        kind=kind,
        iteration=iteration,
        n=n,
        input_tokens=read,
        output_tokens=written,
        seconds=seconds,
    )
    return state.model_copy(update={"calls": (*state.calls, call)})


def _with_note(state: State, number: int, kind: Step, note: Note) -> State:
    iteration = _iteration(state, number).model_copy(update={kind: note})
    return state.model_copy(update={"iterations": (*state.iterations[: number - 1], iteration)})


def _storable(text: str) -> str:
    """Without what PostgreSQL and UTF-8 cannot hold: NUL and lone surrogates."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _why_none(state: State, spent: Budget | None) -> str:
    reasons = sorted({str(c.unusable) for c in state.candidates})
    message = f"No sampled response can be used: all {len(state.candidates)} are {', '.join(reasons)}."
    if "cut_off" in reasons:
        message += f" Raise max_tokens (now {state.params.max_tokens}) if the context has room, or ask for less."
    if spent:
        message += f" The budget {spent} left no second try."
    return message
