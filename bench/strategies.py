"""Jobs in the shape of D1-N5 with random tokens instead of texts, and the ways to have a model answer their calls.

A job is a generator: it yields what it asks for, and is sent the answers. Every answer has exactly the length that was
asked for (no token ends it), so that all ways write the same number of tokens.
"""

import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tpo.backends.local.engine import StepEngine
from tpo.backends.local.factory import EngineOptions, build_engine
from tpo.backends.local.requests import TokenRequest

VOCABULARY = 8192
SHAPES = {
    "25M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
    "150M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},
}
N, D = 5, 1
QUERY, RESPONSE, LOSS, GRADIENT = 48, 32, 24, 24
TEMPLATE, ASK = 64, 16
"""Tokens of the reviewer's instructions, and of each further turn's request."""
SPREAD = 0.25
"""Answers are that much longer or shorter: jobs do not go in step."""
ROWS = 128
"""Sequences that are written at once, at most; the same for each way that batches."""
TEMPERATURE, TOP_P = 0.7, 0.95

Tokens = list[int]


@dataclass(frozen=True)
class Ask:
    """One call: a prompt, and so many answers of so many tokens."""

    prompt: Tokens
    n: int
    length: int
    seed: int
    under_way: bool


Job = Generator[Ask, list[Tokens], None]


def job(number: int, prompts: str = "conversation") -> Job:
    """A D1-N5 job; its random tokens and lengths follow from its number."""
    chance = random.Random(number)
    calls = 0

    def tokens(count: int) -> Tokens:
        return [chance.randrange(VOCABULARY) for _ in range(count)]

    def ask(prompt: Tokens, n: int, mean: int) -> Ask:
        nonlocal calls
        calls += 1
        length = round(mean * chance.uniform(1 - SPREAD, 1 + SPREAD))
        return Ask(prompt, n, length, 1000 * number + 10 * calls, calls > 1)

    query = tokens(QUERY)
    answers = yield ask(query, N, RESPONSE)
    for _ in range(D):
        talk = [*_template(0), *query, *answers[0], *answers[1]]
        (loss,) = yield ask(talk, 1, LOSS)
        talk = [*talk, *loss, *tokens(ASK)] if prompts == "conversation" else [*_template(1), *loss]
        (gradient,) = yield ask(talk, 1, GRADIENT)
        if prompts == "conversation":
            talk = [*talk, *gradient, *tokens(ASK)]
        else:
            talk = [*_template(2), *query, *answers[0], *gradient]
        answers = yield ask(talk, N, RESPONSE)


def _template(which: int) -> Tokens:
    """Instructions that all jobs have in common."""
    return [(31 * which + 7 * i) % VOCABULARY for i in range(TEMPLATE)]


def llama(name: str) -> Any:
    """A Llama with random weights, whose next token is about as uncertain as a trained model's.

    Logits of usual random weights are flat, and top_p keeps thousands of tokens; scaled, it keeps some tens.
    """
    model = random_model(LlamaForCausalLM, name)
    model.lm_head.weight.mul_(3.5 / (0.02 * model.config.hidden_size**0.5))
    return model


def random_model(model_class: Any, name: str, **more: Any) -> Any:
    """A model with the shape of that name and random weights; nothing ends its answers."""
    torch.manual_seed(0)
    config_class: Any = LlamaConfig
    config = config_class(
        vocab_size=VOCABULARY,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
        **SHAPES[name],
        **more,
    )
    return model_class(config).eval().requires_grad_(False)


@dataclass(frozen=True)
class Run:
    """What one way needed for some jobs."""

    tokens: int
    """Generated, the padding not counted."""
    cpu: float
    """Seconds, over all threads of this process."""
    wall: float
    ends: tuple[float, ...]
    """When each job ended, in seconds of the wall clock."""


def measured(jobs: Sequence[Job], way: "Callable[[Progress], None]") -> Run:
    """Let a way carry the jobs to their ends."""
    progress = Progress(jobs)
    wall, cpu = time.perf_counter(), time.process_time()
    way(progress)
    cpu, ended = time.process_time() - cpu, time.perf_counter()
    return Run(progress.tokens, cpu, ended - wall, tuple(end - wall for end in progress.ends))


class Progress:
    """Jobs under way: what each asks for now, and when it ended."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.asks: dict[int, Ask] = {i: next(job) for i, job in enumerate(jobs)}
        """By the job's index; without those that have ended."""
        self.tokens = 0
        self.ends: list[float] = []

    def answer(self, i: int, answers: list[Tokens]) -> bool:
        """Send a job its answers; whether it asks for more."""
        self.tokens += sum(map(len, answers))
        try:
            self.asks[i] = self._jobs[i].send(answers)
        except StopIteration:
            del self.asks[i]
            self.ends.append(time.perf_counter())
            return False
        return True


def _generate(model: Any, asks: Sequence[Ask]) -> list[list[Tokens]]:
    """One `generate` for all, padded on the left, as long as the longest answer; the answers of each call."""
    width = max(len(ask.prompt) for ask in asks)
    rows = [ask for ask in asks for _ in range(ask.n)]
    alone = len(asks) == 1
    ids = torch.tensor([[0] * (width - len(ask.prompt)) + ask.prompt for ask in (asks if alone else rows)])
    mask = torch.tensor([[0] * (width - len(a.prompt)) + [1] * len(a.prompt) for a in (asks if alone else rows)])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=max(ask.length for ask in asks),
        num_return_sequences=asks[0].n if alone else 1,
        pad_token_id=0,
    )
    whole = iter(out[:, width:].tolist())
    return [[next(whole)[: ask.length] for _ in range(ask.n)] for ask in asks]


def one_at_a_time(model: Any) -> Callable[[Progress], None]:
    """`generate(num_return_sequences=n)`, call after call, job after job."""

    def way(progress: Progress) -> None:
        for i in list(progress.asks):
            while i in progress.asks:
                progress.answer(i, _generate(model, [progress.asks[i]])[0])

    return way


def static_batches(model: Any) -> Callable[[Progress], None]:
    """All calls that wait, up to ROWS sequences, padded into one `generate`; the next batch when it is whole."""

    def way(progress: Progress) -> None:
        while progress.asks:
            batch: list[int] = []
            for i, ask in progress.asks.items():
                if sum(progress.asks[j].n for j in batch) + ask.n <= ROWS:
                    batch.append(i)
            answers = _generate(model, [progress.asks[i] for i in batch])
            for i, answer in zip(batch, answers, strict=True):
                progress.answer(i, answer)
                if i in progress.asks:
                    # Whoever was in this batch stands behind those who wait.
                    progress.asks[i] = progress.asks.pop(i)

    return way


def continuous_batching(model: Any, jobs: int) -> Callable[[Progress], None]:
    """transformers' own continuous batching, small pages with shared prefixes, a cache that holds all."""
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=64,
        eos_token_id=-1,
        pad_token_id=0,
    )
    rows = min(ROWS, N * jobs)
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=16 * rows + 64, max_batch_tokens=max(256, 2 * rows), max_requests_per_batch=rows
    )

    def way(progress: Progress) -> None:
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, block=True, timeout=5
        ) as manager:
            answers: dict[int, list[Tokens]] = {}
            numbers: dict[str, int] = {}

            def submit(i: int) -> None:
                ask = progress.asks[i]
                answers[i] = []
                for _ in range(ask.n):
                    numbers[manager.add_request(ask.prompt, max_new_tokens=ask.length)] = i

            for i in list(progress.asks):
                submit(i)
            while progress.asks:
                result = manager.get_result(timeout=1)
                if result is None or not result.is_finished():
                    if not manager.is_running():
                        raise RuntimeError("transformers' continuous batching has died")
                    continue
                i = numbers.pop(result.request_id)
                answers[i].append(result.generated_tokens)
                if len(answers[i]) == progress.asks[i].n and progress.answer(i, answers[i]):
                    submit(i)

    return way


def our_engine(engine: StepEngine, reused: list[int] | None = None) -> Callable[[Progress], None]:
    """The engine, with a thread for each job; `reused` takes each call's prompt tokens that need not be read."""

    def way(progress: Progress) -> None:
        lock = threading.Lock()

        def carry(i: int) -> None:
            going = True
            while going:
                ask = progress.asks[i]
                seeds = tuple(ask.seed + k for k in range(ask.n))
                request = TokenRequest(tuple(ask.prompt), seeds, TEMPERATURE, TOP_P, ask.length, ask.under_way)
                answer = engine.submit(request).result()
                answers = [list(c.tokens) for c in answer.completions]
                with lock:
                    if reused is not None:
                        reused.append(answer.timings.reused_tokens)
                    going = progress.answer(i, answers)

        threads = [threading.Thread(target=carry, args=(i,)) for i in progress.asks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return way


def start(model: Any, cache_gib: float = 1.0) -> StepEngine:
    """The engine over a model, whose own `generate` no longer works from here on."""
    return build_engine(model, frozenset(), 1024, EngineOptions(rows=ROWS, cache_gib=cache_gib))


def peak_mib() -> float:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
