"""`tpo run`: one optimization in this process, without a server or a database."""

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from tpo.cli import options
from tpo.cli.options import without_none
from tpo.cli.ui.output import INTERRUPTED, USAGE, Failure, console, messages, print_json


@options.Optimization
def run(
    parameters: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="Prompt to answer; - reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="File that contains the prompt.")] = None,
    model: options.Model = None,
    reward_model: options.RewardModel = None,
    prompt_set: options.PromptSet = None,
    system: options.System = None,
    as_json: options.AsJson = False,
) -> None:
    """Optimize one answer in this process and show why it won. Ctrl-C stops with the best answer so far."""
    if (prompt is None) == (file is None):
        raise Failure("give either a prompt (- for stdin) or --file", USAGE)
    text = options.read_file(file) if file else options.read_text(prompt or "")

    from tpo.cli.environment import read_settings
    from tpo.cli.local_run import optimize
    from tpo.cli.ui.record import WHY, Record, print_outcome
    from tpo.core.loop import locate
    from tpo.core.state import Budget

    settings = read_settings(**without_none(policy=model, reward_model=reward_model, prompt_set=prompt_set))
    state, interrupted = optimize(settings, options.messages_of(text, system), parameters, messages())
    stopped = locate(state).stopped
    if as_json:
        best = state.best
        cut = "interrupted" if interrupted else stopped if stopped in get_args(Budget) else None
        print_json(
            {
                "status": "incomplete" if cut else "completed",
                "incomplete_details": {"reason": cut} if cut else None,
                "stop_reason": None if cut else stopped,
                "output": best.text if best else None,
                "best": best.model_dump() if best else None,
                "mean_rewards": [state.mean_reward(i) for i in range(len(state.iterations) + 1)],
                "usage": {**state.usage.model_dump(), "total_tokens": state.usage.total_tokens},
                **state.model_dump(mode="json", include={"input", "params", "iterations", "candidates", "calls"}),
            }
        )
    elif state.candidates:
        print_outcome(console(), Record.of_state(state))
    if stopped:
        messages().print(f"Ended in iteration {locate(state).iteration}: {WHY[stopped]}.")
    if interrupted:
        messages().print("Interrupted." if state.best is None else "Interrupted: this is the best answer so far.")
        raise typer.Exit(INTERRUPTED)
