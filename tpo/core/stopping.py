"""When a run ends before its last iteration: a budget is used up, or going on is not worth it. Pure, like the loop.

Each rule reads the recorded calls and rewards alone, so that a resumed run ends where an uninterrupted one does.
"""

from tpo.core.state import Budget, GivenUp, State


def used_up(state: State) -> Budget | None:
    """The budget that is used up, if one is. What another job has used, whose record this one started from, is its own.

    It is looked at before each call of the policy: what was sampled is always scored, and the last call may exceed it.
    """
    params, usage = state.params, state.usage
    used: tuple[tuple[Budget, float | None, float], ...] = (
        ("max_output_tokens", params.max_output_tokens, usage.output_tokens),
        ("max_total_tokens", params.max_total_tokens, usage.total_tokens),
        ("max_seconds", params.max_seconds, usage.model_seconds),
    )
    return next((name for name, most, spent in used if most is not None and spent >= most), None)


def given_up(state: State, complete: int) -> GivenUp | None:
    """Why no iteration should follow `complete`, the last one, if there is a reason.

    A job judges by the iterations that it made itself, so that one which extends another is not given up at once.
    """
    rule = state.params.early_stop
    if rule is None and not state.params.stop_on_decline:
        return None
    own = {call.iteration for call in state.calls}
    if state.params.stop_on_decline and complete in own and complete in state.declines:
        return "decline"
    if rule is None or complete < rule.patience:
        return None
    watched = range(complete - rule.patience + 1, complete + 1)
    if own.issuperset(watched) and _best(state, complete) - _best(state, watched[0] - 1) <= rule.min_gain:
        return "early_stop"
    return None


def _best(state: State, iteration: int) -> float:
    """The highest reward of the pool when that iteration was complete. There is one: the first sampling gave it."""
    return max(c.reward for c in state.pool if c.iteration <= iteration and c.reward is not None)
