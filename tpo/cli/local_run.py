"""Driver of `tpo run`: models in this process, progress on the terminal, Ctrl-C between two tokens."""

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tpo.backends import load_models
from tpo.cli.ui.output import USAGE, Failure
from tpo.cli.ui.record import Record, number, rewards_table
from tpo.core import prompts
from tpo.core.errors import CallInterruptedError
from tpo.core.loop import Position, Step, locate
from tpo.core.run import run
from tpo.core.state import Message, Params, State
from tpo.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

_ACTIVITIES = {
    "sampling": "sampling",
    "scoring": "scoring",
    "critique": "writing the critique of",
    "gradient": "writing the gradient of",
    "update": "revising in",
}


def optimize(
    settings: Settings, conversation: list[dict[str, str]], parameters: dict[str, Any], console: "Console"
) -> tuple[State, bool]:
    """Run an optimization. Returns the last state, and whether Ctrl-C interrupted it. Raises Failure and TPOError."""
    state = State(
        input=tuple(Message.model_validate(m) for m in conversation),
        params=_params(settings, parameters),
        prompts=prompts.load(settings.default_prompt_set),
    )
    if not conversation[-1]["content"].strip():
        raise Failure("the prompt is empty", USAGE)
    last = state
    with _Progress(console) as progress, _ctrl_c() as interrupt:
        progress.show("loading the models")
        try:
            policy, reward = load_models(settings)
            with closing(policy), closing(reward):

                def checkpoint(step: Step) -> None:
                    nonlocal last
                    progress.advance(step)
                    last = step.after

                progress.begin(state)
                return run(state, policy, reward, checkpoint, interrupt), False
        except CallInterruptedError:
            return last, True


def _params(settings: Settings, given: dict[str, Any]) -> Params:
    try:
        return Params.model_validate({**settings.stopping, **given})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Failure(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}", USAGE) from None


@contextmanager
def _ctrl_c() -> Iterator[Any]:
    """Handle Ctrl-C: the first one ends the run at its next token, the second one immediately."""
    interrupted = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    def interrupt() -> None:
        if interrupted:
            raise CallInterruptedError("cancelled")

    old = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, old)


class _Progress:
    """Progress display: a live table of rewards above a spinner on a terminal, else a line for each model call."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._started = time.monotonic()
        self._state: State | None = None

    def __enter__(self) -> "_Progress":
        from rich.live import Live

        self._live = Live(console=self._console, transient=True) if self._console.is_terminal else None
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, activity: str) -> None:
        """Show what is being done now. Does nothing if the output is not a terminal."""
        if not self._live:
            return
        from rich.console import Group
        from rich.spinner import Spinner

        spinner = Spinner("dots", f"{activity} ...")
        has_rewards = self._state is not None and self._state.candidates
        self._live.update(
            Group(rewards_table(Record.of_state(self._state)), spinner) if self._state and has_rewards else spinner
        )

    def begin(self, state: State) -> None:
        """Show the first activity of a run."""
        self._update(state, locate(state))

    def advance(self, step: Step) -> None:
        """Show the result of a model call and the next activity."""
        if not self._live:
            self._console.print(f"{time.monotonic() - self._started:6.1f} s  {_summary(step)}", markup=False)
        self._update(step.after, step.position)

    def _update(self, state: State, position: Position) -> None:
        self._state = state
        if position.phase:
            self.show(f"{_ACTIVITIES[position.phase]} iteration {position.iteration}")


def _summary(step: Step) -> str:
    before, now = step.before, step.after
    call = now.calls[-1]
    name = f"iteration {call.iteration}"
    if call.kind == "score":
        rewards = [number(c.reward) for c in now.of_iteration(call.iteration)]
        best = now.best
        return f"{name}  rewards {' '.join(rewards)}  best so far {number(best.reward if best else None)}"
    if call.kind in ("critique", "gradient"):
        return f"{name}  {call.kind}  {call.output_tokens} tokens"
    usable = sum(1 for c in now.candidates[len(before.candidates) :] if c.unusable is None)
    return f"{name}  {usable} of {call.n} candidates usable  {call.output_tokens} tokens"
