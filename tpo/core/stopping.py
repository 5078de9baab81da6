"""Rules that end a run before its last iteration: an exhausted budget, no gain, or a decline. Pure, like the loop.

Each rule reads only recorded calls and rewards, so a resumed run ends where an uninterrupted one does.
"""

from tpo.core.state import Budget, State, StopReason


def exhausted_budget(state: State) -> Budget | None:
    """Return the exhausted budget, if there is one. The usage of a job that this one started from does not count.

    Budgets are checked before each call of the policy: samples are always scored, and the last call may exceed one.
    """
    params, usage = state.params, state.usage
    used: tuple[tuple[Budget, float | None, float], ...] = (
        ("max_output_tokens", params.max_output_tokens, usage.output_tokens),
        ("max_total_tokens", params.max_total_tokens, usage.total_tokens),
        ("max_seconds", params.max_seconds, usage.model_seconds),
    )
    return next((name for name, most, spent in used if most is not None and spent >= most), None)


def stop_reason_after(state: State, complete: int) -> StopReason | None:
    """Return why no iteration should follow `complete`, the last one; None if one should.

    A job judges only by its own iterations, so that one which extends another is not stopped at once.
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
    """Return the highest reward of the pool when that iteration was complete. The first sampling gave at least one."""
    return max(c.reward for c in state.pool if c.iteration <= iteration and c.reward is not None)
