"""The driver: does what the core says is next, and checkpoints after every model call."""

from collections.abc import Callable

from tpo.core.loop import pending, with_scores, with_texts
from tpo.core.ports import Generate, Interrupt, Policy, RewardModel, Score
from tpo.core.state import State

Checkpoint = Callable[[State], None]


def run(
    state: State,
    policy: Policy,
    reward: RewardModel,
    checkpoint: Checkpoint,
    interrupt: Interrupt,
    before_call: Interrupt | None = None,
) -> State:
    """Carry one optimization to its end and return its last state.

    `checkpoint` is called once after each model call, with the state that holds its result; what it raises ends the
    run. Resuming is calling this again with the state that was checkpointed last. `before_call` is asked before each
    call, where it is not the same as `interrupt`, which is asked within it.
    """
    while request := pending(state):
        (before_call or interrupt)()
        match request:
            case Generate():
                state = with_texts(state, policy.generate(request, interrupt))
            case Score():
                state = with_scores(state, reward.score(request, interrupt))
        checkpoint(state)
    return state
