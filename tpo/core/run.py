"""The driver: make the next model call, apply its reply, checkpoint, repeat."""

from collections.abc import Callable

from tpo.core.loop import Step, apply, locate, request_at
from tpo.core.ports import Generate, Interrupt, Policy, RewardModel
from tpo.core.state import State

Checkpoint = Callable[[Step], object]
"""Records one model call. An exception that it raises ends the run."""


def run(
    state: State,
    policy: Policy,
    reward: RewardModel,
    checkpoint: Checkpoint,
    interrupt: Interrupt,
    before_call: Interrupt | None = None,
) -> State:
    """Run one optimization to its end and return its last state.

    `checkpoint` is called after each model call; an exception that it raises ends the run. To resume, call this again
    with the last state that was recorded. `interrupt` is called during and before model calls; `before_call`, if given,
    replaces it before calls. Raises what the models, `checkpoint` and the interrupts raise, and NoUsableSampleError.
    """
    position = locate(state)
    while request := request_at(state, position):
        (before_call or interrupt)()
        if isinstance(request, Generate):
            after = apply(state, request, policy.generate(request, interrupt))
        else:
            after = apply(state, request, reward.score(request, interrupt))
        position = locate(after)
        checkpoint(Step(state, request, after, position))
        state = after
    return state
