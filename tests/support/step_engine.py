"""Start step engines of tiny models, and send them requests."""

import copy
from typing import Any

import torch

from tpo.backends.local.engine import StepEngine
from tpo.backends.local.requests import Completion, RequestOutput, TokenRequest
from tpo.backends.local.runner import Runner, install_attention
from tpo.backends.local.scheduler import SchedulerConfig

Completions = tuple[Completion, ...]

PROMPTS = [tuple((7 * i + 3 * j) % 250 for j in range(length)) for i, length in enumerate((5, 40, 17, 90))]


def greedy(prompt: tuple[int, ...], n: int = 1, max_tokens: int = 30) -> TokenRequest:
    """Build a greedy request with `n` samples."""
    return TokenRequest(prompt, tuple(range(n)), 0.0, 1.0, max_tokens)


def sampled(prompt: tuple[int, ...], *seeds: int, top_p: float = 0.95, max_tokens: int = 30) -> TokenRequest:
    """Build a request with one sample for each seed, at temperature 0.7."""
    return TokenRequest(prompt, seeds, 0.7, top_p, max_tokens)


def start(
    model: Any, stop: frozenset[int] = frozenset(), rows: int = 16, tokens: int = 10_000, chunk: int = 64
) -> StepEngine:
    """Start an engine on a copy of the model, so that the attention of the original is not changed."""
    model = copy.deepcopy(model)
    return StepEngine(
        Runner(model, install_attention(model, "model"), tokens), SchedulerConfig(rows, tokens, chunk), stop
    )


def results(engine: StepEngine, *requests: TokenRequest) -> list[Completions]:
    """Submit all requests at once, and return the completions of each."""
    return [answer.completions for answer in answers(engine, *requests)]


def answers(engine: StepEngine, *requests: TokenRequest) -> list[RequestOutput]:
    """Submit all requests before the next step begins, and return their answers."""
    with engine._changed:
        futures = [engine.submit(request) for request in requests]
    return [future.result(60) for future in futures]


def record(finished: list[int], number: int, _: object) -> None:
    """Append a number to a list, as a callback of a future."""
    finished.append(number)


def generated(model: Any, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """Return the greedy tokens of transformers' own generate."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, top_k=None, top_p=None
    )
    return tuple(out[0, len(prompt) :].tolist())
