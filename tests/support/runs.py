"""Run jobs in process with fake models, and summarise the calls that were made."""

from collections.abc import Callable

from testing.fakes import FakePolicy, FakeReward, proceed, text_per_seed
from tpo.core.ports import Text
from tpo.core.run import run
from tpo.core.state import State


def finish(state: State, policy: FakePolicy | None = None, reward: FakeReward | None = None) -> State:
    """Run to the end and return the last state."""
    return run(state, policy or FakePolicy(), reward or FakeReward(), lambda _: None, proceed)


def call_kinds(state: State) -> list[tuple[str, int, int]]:
    """Return kind, iteration and number of samples of each call that was made."""
    return [(c.kind, c.iteration, c.n) for c in state.calls]


def reward_by_first_word(values: dict[str, float], default: float = 0.0) -> FakeReward:
    """Return a reward model that scores a text by its first word."""
    return FakeReward(lambda text: values.get(text.split()[0], default))


def policy_with_updates(reply: Callable[[int], Text]) -> FakePolicy:
    """Return a policy that answers updates by the sample's number, and all other requests as usual."""
    return FakePolicy(lambda r, s: reply(s) if r.kind == "update" else text_per_seed(r, s))
