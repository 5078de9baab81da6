"""Jobs in the shape of D1-N5 with random tokens instead of texts, and the strategies for serving their model calls.

A job is a generator: it yields its next model call and is sent the completions. Every completion has exactly the
requested length (no token ends it), so all strategies generate the same number of tokens.
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
QUERY, SAMPLE, CRITIQUE, GRADIENT = 48, 32, 24, 24
TEMPLATE, FOLLOW_UP = 64, 16
"""Tokens of the reviewer's instructions, and of the request in each further chat turn."""
SPREAD = 0.25
"""Completions are longer or shorter by up to this share, so that jobs do not run in lockstep."""
ROWS = 128
"""Maximum number of sequences in a batch; the same for each strategy that batches."""
TEMPERATURE, TOP_P = 0.7, 0.95

Tokens = list[int]


@dataclass(frozen=True)
class ModelCall:
    """One call of a job: a prompt, and `n` completions of `length` tokens."""

    prompt: Tokens
    n: int
    length: int
    seed: int
    is_continued: bool
    """True if the job had a completion before."""


Job = Generator[ModelCall, list[Tokens], None]


def job(number: int, prompts: str = "conversation") -> Job:
    """Run a D1-N5 job; its random tokens and lengths are determined by its number."""
    source = random.Random(number)
    calls = 0

    def tokens(count: int) -> Tokens:
        return [source.randrange(VOCABULARY) for _ in range(count)]

    def call(prompt: Tokens, n: int, mean: int) -> ModelCall:
        nonlocal calls
        calls += 1
        length = round(mean * source.uniform(1 - SPREAD, 1 + SPREAD))
        return ModelCall(prompt, n, length, 1000 * number + 10 * calls, calls > 1)

    query = tokens(QUERY)
    samples = yield call(query, N, SAMPLE)
    for _ in range(D):
        prompt = [*_template(0), *query, *samples[0], *samples[1]]
        (critique,) = yield call(prompt, 1, CRITIQUE)
        prompt = [*prompt, *critique, *tokens(FOLLOW_UP)] if prompts == "conversation" else [*_template(1), *critique]
        (gradient,) = yield call(prompt, 1, GRADIENT)
        if prompts == "conversation":
            prompt = [*prompt, *gradient, *tokens(FOLLOW_UP)]
        else:
            prompt = [*_template(2), *query, *samples[0], *gradient]
        samples = yield call(prompt, N, SAMPLE)


def _template(number: int) -> Tokens:
    """Return instructions that all jobs have in common."""
    return [(31 * number + 7 * i) % VOCABULARY for i in range(TEMPLATE)]


def create_llama(name: str) -> Any:
    """Create a Llama with random weights whose next token is about as uncertain as a trained model's.

    The logits of ordinary random weights are flat, and top_p keeps thousands of tokens; scaled, it keeps some tens.
    """
    model = random_model(LlamaForCausalLM, name)
    model.lm_head.weight.mul_(3.5 / (0.02 * model.config.hidden_size**0.5))
    return model


def random_model(model_class: Any, name: str, **more: Any) -> Any:
    """Create a model with the shape of that name and random weights, without an end token."""
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
    """Cost of some jobs with one strategy."""

    tokens: int
    """Generated tokens without padding."""
    cpu: float
    """CPU seconds of all threads of this process."""
    wall: float
    """Seconds of the wall clock."""
    ends: tuple[float, ...]
    """Time from the start to the end of each job, in seconds of the wall clock."""


def measure(jobs: Sequence[Job], strategy: "Callable[[Progress], None]") -> Run:
    """Run the jobs to their ends with a strategy."""
    progress = Progress(jobs)
    wall, cpu = time.perf_counter(), time.process_time()
    strategy(progress)
    cpu, ended = time.process_time() - cpu, time.perf_counter()
    return Run(progress.tokens, cpu, ended - wall, tuple(end - wall for end in progress.ends))


class Progress:
    """Running jobs: the pending call of each, and the end time of each ended job."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.pending: dict[int, ModelCall] = {i: next(job) for i, job in enumerate(jobs)}
        """By the job's index, without ended jobs."""
        self.tokens = 0
        self.ends: list[float] = []

    def answer(self, i: int, completions: list[Tokens]) -> bool:
        """Send a job its completions. Returns True if the job makes another call."""
        self.tokens += sum(map(len, completions))
        try:
            self.pending[i] = self._jobs[i].send(completions)
        except StopIteration:
            del self.pending[i]
            self.ends.append(time.perf_counter())
            return False
        return True


def _generate(model: Any, calls: Sequence[ModelCall]) -> list[list[Tokens]]:
    """Serve all calls with one `generate`, padded on the left and as long as the longest completion.

    Returns the completions of each call.
    """
    width = max(len(call.prompt) for call in calls)
    is_single = len(calls) == 1
    rows = calls if is_single else [call for call in calls for _ in range(call.n)]
    ids = torch.tensor([[0] * (width - len(call.prompt)) + call.prompt for call in rows])
    mask = torch.tensor([[0] * (width - len(call.prompt)) + [1] * len(call.prompt) for call in rows])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=max(call.length for call in calls),
        num_return_sequences=calls[0].n if is_single else 1,
        pad_token_id=0,
    )
    sequences = iter(out[:, width:].tolist())
    return [[next(sequences)[: call.length] for _ in range(call.n)] for call in calls]


def one_at_a_time(model: Any) -> Callable[[Progress], None]:
    """Call `generate(num_return_sequences=n)` for one call after the other, one job after the other."""

    def strategy(progress: Progress) -> None:
        for i in list(progress.pending):
            while i in progress.pending:
                progress.answer(i, _generate(model, [progress.pending[i]])[0])

    return strategy


def static_batches(model: Any) -> Callable[[Progress], None]:
    """Pad all pending calls, up to ROWS sequences, into one `generate`; start the next batch when it is complete."""

    def strategy(progress: Progress) -> None:
        while progress.pending:
            batch: list[int] = []
            for i, call in progress.pending.items():
                if sum(progress.pending[j].n for j in batch) + call.n <= ROWS:
                    batch.append(i)
            results = _generate(model, [progress.pending[i] for i in batch])
            for i, completions in zip(batch, results, strict=True):
                progress.answer(i, completions)
                if i in progress.pending:
                    # Jobs of this batch move behind the waiting ones.
                    progress.pending[i] = progress.pending.pop(i)

    return strategy


def continuous_batching(model: Any, jobs: int) -> Callable[[Progress], None]:
    """Use transformers' own continuous batching: small pages, shared prefixes, a cache large enough for all jobs."""
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

    def strategy(progress: Progress) -> None:
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, block=True, timeout=5
        ) as manager:
            completions: dict[int, list[Tokens]] = {}
            numbers: dict[str, int] = {}

            def submit(i: int) -> None:
                call = progress.pending[i]
                completions[i] = []
                for _ in range(call.n):
                    numbers[manager.add_request(call.prompt, max_new_tokens=call.length)] = i

            for i in list(progress.pending):
                submit(i)
            while progress.pending:
                result = manager.get_result(timeout=1)
                if result is None or not result.is_finished():
                    if not manager.is_running():
                        raise RuntimeError("transformers' continuous batching has stopped: see the log above")
                    continue
                i = numbers.pop(result.request_id)
                completions[i].append(result.generated_tokens)
                if len(completions[i]) == progress.pending[i].n and progress.answer(i, completions[i]):
                    submit(i)

    return strategy


def our_engine(engine: StepEngine, reused: list[int] | None = None) -> Callable[[Progress], None]:
    """Use the engine, with one thread per job. `reused` receives the prompt tokens that each call found cached."""

    def strategy(progress: Progress) -> None:
        lock = threading.Lock()

        def run(i: int) -> None:
            has_more = True
            while has_more:
                call = progress.pending[i]
                seeds = tuple(call.seed + k for k in range(call.n))
                request = TokenRequest(tuple(call.prompt), seeds, TEMPERATURE, TOP_P, call.length, call.is_continued)
                result = engine.submit(request).result()
                completions = [list(c.tokens) for c in result.completions]
                with lock:
                    if reused is not None:
                        reused.append(result.metrics.cached_tokens)
                    has_more = progress.answer(i, completions)

        threads = [threading.Thread(target=run, args=(i,)) for i in progress.pending]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return strategy


def start(model: Any, cache_gib: float = 1.0) -> StepEngine:
    """Start the engine on a model. The model's own `generate` no longer works afterwards."""
    return build_engine(model, frozenset(), 1024, EngineOptions(max_sequences=ROWS, cache_gib=cache_gib))


def peak_mib() -> float:
    """Return the peak memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
