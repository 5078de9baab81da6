"""Run model calls of a job with deterministic replies."""

from testing.jobs import claim_one
from tpo.core.loop import Step, apply, locate, pending
from tpo.core.ports import Generate, Generation, Rewards, Text
from tpo.core.state import State
from tpo.jobs.outcomes import outcome_of_run
from tpo.store import Store


def run_steps(store: Store, job_id: str, steps: int | None = None) -> State:
    """Run a job's next model calls with deterministic replies: the reward of a text is its length."""
    claimed = claim_one(store, job_id, "worker-1", 30, model="scripted", reward_model="scripted")
    assert claimed
    lease, state = claimed
    while (request := pending(state)) and (steps is None or steps > 0):
        reply: Generation | Rewards
        if isinstance(request, Generate):
            texts = tuple(Text(text=_reply(request, i), finish_reason="stop", tokens=10) for i in range(request.n))
            reply = Generation(texts=texts, input_tokens=100, seconds=0.5)
        else:
            values = tuple(float(len(r)) for r in request.responses)
            reply = Rewards(values=values, input_tokens=7, seconds=0.25)
        after = apply(state, request, reply)
        store.leases.checkpoint(lease, Step(state, request, after, locate(after)))
        state = after
        steps = None if steps is None else steps - 1
    if pending(state) is None:
        store.leases.finish(lease, outcome_of_run(state))
    return state


def _reply(request: Generate, i: int) -> str:
    match request.kind:
        case "sample":
            return "x" * (i + 1)
        case "update":
            answer = "y" * (10 * request.iteration + i)
            return f"<improved_response>{answer}</improved_response>" if i else "no tags"
        case kind:
            return f"{kind} of {request.iteration}"
