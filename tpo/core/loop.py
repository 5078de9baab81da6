"""The algorithm: decide the next model call, and apply its reply. Pure: no I/O, no clock, no randomness of its own.

Li et al., "Test-Time Preference Optimization", ICML 2025, arXiv 2501.12895, section 4. Where the authors' code leaves
a case open (an empty pair of tags, a NaN reward, one seed for every iteration), this module states the rule.

    while request := pending(state):
        state = apply(state, request, reply_to(request))
"""

import math
from typing import Literal, NamedTuple

from tpo.core.errors import BadReplyError, NoUsableSampleError
from tpo.core.extraction import extract_answer, storable
from tpo.core.ports import Generate, Generation, Reply, Request, Rewards, Score
from tpo.core.requests import NextCall, build_request
from tpo.core.state import Budget, Call, CallKind, Candidate, Note, RewardPart, State, StopReason
from tpo.core.stopping import exhausted_budget, stop_reason_after

Phase = Literal["sampling", "scoring", "critique", "gradient", "update"]
_PHASES: dict[CallKind, Phase] = {
    "sample": "sampling",
    "score": "scoring",
    "critique": "critique",
    "gradient": "gradient",
    "update": "update",
}


class Position(NamedTuple):
    """A place in a run: the current iteration, and the call that comes next."""

    iteration: int
    """The current iteration, or the last one at the end of the run."""
    phase: Phase | None
    """The phase of the next call; None at the end of the run."""
    complete: int
    """Number of complete iterations; the first sampling counts as one."""
    stopped: Budget | StopReason | None = None
    """Why the run ends although iterations are left."""
    call: NextCall | None = None
    """The next call; None at the end of the run."""
    failure: str | None = None
    """Why the run cannot continue: none of its candidates has a reward."""


class Step(NamedTuple):
    """One model call of a run: the state before it, its request, the state with its reply, and the next position."""

    before: State
    request: Request
    after: State
    position: Position
    """The position of the state after the call."""


def pending(state: State) -> Request | None:
    """Return the next request, or None at the end of the run.

    Raises NoUsableSampleError if no first sample is usable, after a second round of samples where the budget allows it.
    """
    return request_at(state, locate(state))


def locate(state: State) -> Position:
    """Find the position of a run. This is cheap: it renders no prompt."""
    for number in range(state.params.iterations + 1):
        has_begun = number <= len(state.iterations)
        if not has_begun and (reason := stop_reason_after(state, number - 1)):
            return Position(number - 1, None, number, reason)
        call = _next_call(state, number)
        exhausted = exhausted_budget(state) if call and call.kind != "score" else None
        if number == 0 and not state.pool and (call is None or exhausted):
            return Position(0, None, complete=1, failure=_failure_message(state, exhausted))
        if call and not exhausted:
            return Position(number, _PHASES[call.kind], number, call=call)
        if exhausted:
            return Position(number if has_begun else number - 1, None, number, exhausted)
    last = state.params.iterations
    return Position(last, None, last + 1)


def request_at(state: State, position: Position) -> Request | None:
    """Build the request at a position, or return None at the end of the run. Raises NoUsableSampleError."""
    if position.failure is not None:
        raise NoUsableSampleError(position.failure)
    return build_request(state, position.call) if position.call else None


def apply(state: State, request: Request, reply: Reply) -> State:
    """Return the state with the reply to its pending request. Raises BadReplyError if the reply does not fit."""
    match request, reply:
        case Generate(), Generation():
            return _with_samples(state, request, reply)
        case Score(), Rewards():
            return _with_rewards(state, request, reply)
    raise BadReplyError(f"{type(reply).__name__} is not a reply to {type(request).__name__}.")


def _next_call(state: State, number: int) -> NextCall | None:
    """Return the next call of one iteration; None when it is complete."""
    if number:
        iteration = state.iteration(number)
        notes: tuple[tuple[CallKind, Note | None], ...] = (
            ("critique", iteration.critique),
            ("gradient", iteration.gradient),
        )
        for kind, note in notes:
            if note is None:
                return NextCall(kind, number)
            if not note.text:
                # A blank note is requested once more; if that is blank too, the iteration ends without a candidate.
                return NextCall(kind, number, first=1) if note.attempt == 0 else None
    candidates = list(state.of_iteration(number))
    n = state.params.sample_size
    if not candidates or (len(candidates) == n and all(c.unusable for c in candidates)):
        # A round without any usable sample is repeated once, with new seeds.
        return NextCall("update" if number else "sample", number, len(candidates), n)
    return NextCall("score", number) if state.unscored(number) else None


def _with_samples(state: State, request: Generate, generation: Generation) -> State:
    """Add the call and its samples: new candidates, or a note of the current iteration."""
    if len(generation.texts) != request.n:
        raise BadReplyError(f"The policy returned {len(generation.texts)} samples instead of {request.n}.")
    samples = [t.model_copy(update={"text": storable(t.text)}) for t in generation.texts]
    output_tokens = sum(t.tokens for t in samples) + generation.reasoning_tokens
    input_tokens, seconds = generation.input_tokens, generation.seconds
    state = _with_call(state, request, request.kind, request.n, input_tokens, output_tokens, seconds)
    if request.kind == "critique" or request.kind == "gradient":
        # A note that is cut off at its limit is requested once more, like a blank one. The second is used as it is.
        cut = samples[0].finish_reason == "length" and request.first_sample == 0
        note = Note(text="" if cut else samples[0].text.strip(), attempt=request.first_sample)
        iteration = state.iteration(request.iteration).model_copy(update={request.kind: note})
        return state.model_copy(update={"iterations": (*state.iterations[: request.iteration - 1], iteration)})
    new = []
    for number, sample in enumerate(samples, request.first_sample):
        text, unusable = extract_answer(state.prompts, request.kind, sample)
        new.append(
            Candidate(iteration=request.iteration, sample=number, text=text, tokens=sample.tokens, unusable=unusable)
        )
    return state.model_copy(update={"candidates": (*state.candidates, *new)})


def _with_rewards(state: State, request: Score, rewards: Rewards) -> State:
    """Add the call and its rewards. A reward that is not finite makes its candidate unusable, so it is never best."""
    rewards.check_count("The reward model", len(request.responses))
    returned = len(rewards.values)
    parts = rewards.parts or ((),) * returned
    if len(parts) != returned:
        raise BadReplyError(f"The reward model returned {returned} scores, but parts for {len(parts)}.")
    state = _with_call(state, request, "score", returned, rewards.input_tokens, 0, rewards.seconds)
    scored = {
        candidate.id: _scored(candidate, *reward)
        for candidate, reward in zip(
            state.unscored(request.iteration), zip(rewards.values, parts, strict=True), strict=True
        )
    }
    return state.model_copy(update={"candidates": tuple(scored.get(c.id, c) for c in state.candidates)})


def _scored(candidate: Candidate, value: float, parts: tuple[RewardPart, ...]) -> Candidate:
    """Return a candidate with its reward and the parts of the reward."""
    update = {"reward": value} if math.isfinite(value) else {"unusable": "reward_not_finite"}
    # A part that is not finite becomes null, because JSON has no NaN.
    finite = tuple(
        p if p.value is None or math.isfinite(p.value) else p.model_copy(update={"value": None}) for p in parts
    )
    return candidate.model_copy(update={**update, "parts": finite})


def _with_call(
    state: State, request: Request, kind: CallKind, n: int, input_tokens: int, output_tokens: int, seconds: float
) -> State:
    call = Call(
        number=len(state.calls) + 1,
        kind=kind,
        iteration=request.iteration,
        n=n,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        seconds=seconds,
    )
    return state.model_copy(update={"calls": (*state.calls, call)})


def _failure_message(state: State, exhausted: Budget | None) -> str:
    reasons = sorted({str(c.unusable) for c in state.candidates})
    message = f"No sampled response can be used: all {len(state.candidates)} are {', '.join(reasons)}."
    if "cut_off" in reasons:
        message += f" Raise max_tokens (now {state.params.max_tokens}) if the model's context allows, or ask for less."
    if exhausted:
        message += f" The budget {exhausted} did not allow a second round."
    return message
