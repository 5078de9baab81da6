"""D2-N5 jobs on one GPU: an 8B-shaped bf16 Llama with random weights, and a reward model on the same GPU.

Every completion has its full length (no token ends it), so the engine is measured and not the weights. Needs only
torch, triton and transformers, and downloads nothing. Each row is printed as soon as it is measured.

    python -m bench.gpu [--jobs 1 8 32 64 128] [--reward 0.6b|8b|none] [--seconds 520] [--profile]
"""

import argparse
import importlib.util
import logging
import random
import statistics
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec("pydantic_settings") is None:
    # Skip `tpo/backends/__init__.py`: the engine does not need its imports, which are missing on a bare GPU machine.
    package = types.ModuleType("tpo.backends")
    package.__path__ = [str(Path(__file__).parents[1] / "tpo" / "backends")]
    sys.modules["tpo.backends"] = package

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from tpo.backends.local.engine import StepEngine
from tpo.backends.local.factory import EngineOptions, build_engine
from tpo.backends.local.requests import TokenRequest
from tpo.backends.local.reward_engine import RewardEngine

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
}
SMALL = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
QWEN_06B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
N, D = 5, 2
QUERY, SAMPLE, CRITIQUE, GRADIENT = 100, 500, 350, 450
TEMPLATE, FOLLOW_UP = 150, 80
"""Tokens of the reviewer's instructions, and of the request in each further chat turn."""
DECODED = N * SAMPLE * (D + 1) + D * (CRITIQUE + GRADIENT)
CEILING = 1.0
"""Jobs per second on an H200 by the roofline: 9,200 tokens decoded, 11,800 prefilled, 9,300 scored per job."""


@dataclass(frozen=True)
class Shape:
    """Lengths of one call of a job, in tokens, and its number of completions."""

    prompt: int
    n: int
    completion: int


CALLS = (
    Shape(QUERY, N, SAMPLE),
    *(
        Shape(TEMPLATE + QUERY + 2 * SAMPLE, 1, CRITIQUE),
        Shape(TEMPLATE + QUERY + 2 * SAMPLE + CRITIQUE + FOLLOW_UP, 1, GRADIENT),
        Shape(TEMPLATE + QUERY + 2 * SAMPLE + CRITIQUE + GRADIENT + 2 * FOLLOW_UP, N, SAMPLE),
    )
    * D,
)


def create_model(cls: Any, shape: dict[str, Any], dtype: torch.dtype, device: str, **more: Any) -> Any:
    """Create a model with random weights directly on its device."""
    config_class = Qwen3Config if "Qwen3" in cls.__name__ else LlamaConfig
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            create_config: Any = config_class
            model = cls(create_config(**shape, **more, pad_token_id=None, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


class Job:
    """A D2-N5 job in the shape of the prompt set `conversation`, with random tokens instead of texts."""

    def __init__(self, engine: StepEngine, reward: RewardEngine | None, seed: int, vocabulary: int) -> None:
        self._engine, self._reward = engine, reward
        self._source = random.Random(seed)
        self._vocabulary = vocabulary
        self._seed = seed
        self.seconds = 0.0
        self.in_reward = 0.0

    def run(self) -> None:
        """Run the job to its end."""
        started = time.perf_counter()
        query = self._tokens(QUERY)
        best = self._pick_best(query, self._call(query, N, SAMPLE, is_continued=False))
        for _ in range(D):
            prompt = [*INSTRUCTIONS[:TEMPLATE], *query, *best, *self._tokens(SAMPLE)]
            for length in (CRITIQUE, GRADIENT):
                prompt += [*self._call(prompt, 1, length)[0], *self._tokens(FOLLOW_UP)]
            best = self._pick_best(query, self._call(prompt, N, SAMPLE))
        self.seconds = time.perf_counter() - started

    def _call(self, prompt: list[int], n: int, length: int, *, is_continued: bool = True) -> list[tuple[int, ...]]:
        self._seed += 1000
        seeds = tuple(self._seed * 100 + i for i in range(n))
        request = TokenRequest(tuple(prompt), seeds, 0.7, 0.95, length, is_continued)
        return [c.tokens for c in self._engine.submit(request).result().completions]

    def _pick_best(self, query: list[int], samples: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Return the sample with the highest reward, or the first one without a reward model."""
        if self._reward is None:
            return samples[0]
        started = time.perf_counter()
        scores = self._reward.submit([[*query, *sample] for sample in samples]).result()
        self.in_reward += time.perf_counter() - started
        return samples[max(range(len(samples)), key=scores.__getitem__)]

    def _tokens(self, count: int) -> list[int]:
        return [self._source.randrange(self._vocabulary) for _ in range(count)]


INSTRUCTIONS = [i % 900 for i in range(TEMPLATE)]


def one_at_a_time(model: Any, vocabulary: int, limit: int = 40) -> float:
    """Measure the seconds of one job by `generate`, one call after the other.

    Decoding is measured on `limit` tokens and scaled to the length of each call.
    """
    total = 0.0
    for shape in CALLS[:4]:
        ids = torch.randint(vocabulary, (1, shape.prompt), device=model.device)
        times = []
        for tokens in (1, 1, limit):
            _synchronize(model)
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=0.7,
                top_p=0.95,
                top_k=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                num_return_sequences=shape.n,
                pad_token_id=0,
            )
            _synchronize(model)
            times.append(time.perf_counter() - started)
        seconds = times[1] + (times[2] - times[1]) / (limit - 1) * (shape.completion - 1)
        total += seconds * (1 if shape is CALLS[0] else D)
    return total


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(engine: StepEngine, reward: RewardEngine | None, jobs: int, vocabulary: int) -> None:
    """Compile the kernels and record CUDA graphs for the batch sizes of `jobs` jobs."""
    source = random.Random(0)
    prompts = [tuple(source.randrange(vocabulary) for _ in range(24)) for _ in range(jobs)]
    futures = [
        engine.submit(TokenRequest(p, tuple(range(N)), 0.7, 0.95, 2 + 3 * (i + 1))) for i, p in enumerate(prompts)
    ]
    for future in futures:
        future.result()
    if reward is not None:
        reward.submit([[1] * (QUERY + SAMPLE)] * N).result()


def measure(
    engine: StepEngine, reward: RewardEngine | None, jobs: int, vocabulary: int, baseline: float | None
) -> float:
    """Run `jobs` jobs concurrently, print their row and return the seconds.

    `baseline` is the seconds per job by `generate`, one job at a time.
    """
    running = [Job(engine, reward, 1_000_003 * (jobs + 1) + i, vocabulary) for i in range(jobs)]
    before, steps = dict(engine.phase_seconds), engine.steps
    threads = [threading.Thread(target=job.run) for job in running]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    parts = {name: engine.phase_seconds[name] - before[name] for name in before}
    steps = engine.steps - steps
    job_seconds = [job.seconds for job in running]
    rate = jobs / seconds
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    ratio = f"{rate * baseline:.1f}x" if baseline else "-"
    print(
        f"| {jobs} | {seconds:.1f} | {rate:.3f} | {rate * DECODED:.0f} | {ratio} | {rate / CEILING:.0%} "
        f"| {1000 * parts['decode'] / max(1, steps):.1f} | {parts['decode'] / seconds:.0%} "
        f"| {parts['prefill'] / seconds:.0%} | {parts['schedule'] / seconds:.1%} "
        f"| {statistics.mean(job.in_reward for job in running) / statistics.mean(job_seconds):.0%} "
        f"| {max(job_seconds) / statistics.mean(job_seconds):.2f} | {memory:.0f} |",
        flush=True,
    )
    return seconds


HEADER = (
    "| jobs | s | jobs/s | tokens/s | ratio to generate | share of roofline | ms/step | decode | prefill | schedule "
    "| waiting for reward | slowest/mean | GiB |\n|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def check(device: str) -> None:
    """Compare the engine with `generate` on a small model, and its samples of single requests with those in a batch.

    Prints how many greedy and how many sampled completions are equal.
    """
    torch.manual_seed(1)
    model = create_model(LlamaForCausalLM, {**LLAMA_8B, **SMALL, "initializer_range": 0.2}, torch.float32, device)
    prompts = [torch.randint(1000, (length,)).tolist() for length in (7, 130, 600)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=150, min_new_tokens=150,
            pad_token_id=0,
        )  # fmt: skip
        expected.append(tuple(out[0, len(prompt) :].tolist()))
    engine = build_engine(model, frozenset(), 2048, EngineOptions(max_sequences=64, cache_gib=0.5))
    greedy = [engine.submit(TokenRequest(tuple(p), (1, 2), 0.0, 1.0, 150)) for p in prompts]
    same_greedy = sum({c.tokens for c in f.result().completions} == {e} for f, e in zip(greedy, expected, strict=True))
    requests = [TokenRequest(tuple(prompts[i % 3]), tuple(range(5 * i, 5 * i + 5)), 0.7, 0.95, 150) for i in range(8)]
    single = [engine.submit(r).result().completions for r in requests]
    batched = [f.result().completions for f in [engine.submit(r) for r in requests]]
    same_sampled = sum(a == b for x, y in zip(single, batched, strict=True) for a, b in zip(x, y, strict=True))
    engine.close()
    print(
        f"check ({engine.attention}, fp32): {same_greedy} of 3 greedy completions equal those of generate; "
        f"{same_sampled} of 40 samples are equal alone and in a batch"
    )


def profile(engine: StepEngine, jobs: int, vocabulary: int) -> None:
    """Print the kernels that take a step's time while `jobs` jobs are decoded."""
    source = random.Random(2)
    prompts = [tuple(source.randrange(vocabulary) for _ in range(1000)) for _ in range(jobs)]
    futures = [engine.submit(TokenRequest(p, tuple(range(N)), 0.7, 0.95, 300)) for p in prompts]
    while engine.running_sequences < jobs * N:
        time.sleep(0.05)
    before, steps = dict(engine.phase_seconds), engine.steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        time.sleep(1.5)
    count = max(1, engine.steps - steps)
    print(f"\n{jobs * N} rows, {count} steps; ms/step:", end="")
    print({name: round(1000 * (engine.phase_seconds[name] - before[name]) / count, 2) for name in before})
    print(recorded.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=90))
    for future in futures:
        future.result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure D2-N5 jobs on one GPU.")
    parser.add_argument("--jobs", type=int, nargs="*", default=[1, 8, 32, 64, 128], help="numbers of concurrent jobs")
    parser.add_argument("--reward", choices=["0.6b", "8b", "none"], default="0.6b")
    parser.add_argument("--rows", type=int, default=640, help="maximum number of sequences in a batch")
    parser.add_argument("--seconds", type=float, default=520.0, help="rows that would end later are skipped")
    parser.add_argument("--profile", action="store_true", help="also print the kernels that take a step's time")
    parser.add_argument("--no-generate", action="store_true", help="skip the baseline by generate")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with generate")
    parser.add_argument("--tiny", action="store_true", help="use small models: only to test this script without a GPU")
    options = parser.parse_args()
    started = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    if not options.no_check:
        check(device)
    dtype = torch.float32 if options.tiny else torch.bfloat16
    small = SMALL if options.tiny else {}
    policy = create_model(LlamaForCausalLM, {**LLAMA_8B, **small}, dtype, device)
    vocabulary = policy.config.vocab_size
    baseline = None if options.no_generate else one_at_a_time(policy, vocabulary)
    if baseline:
        print(f"generate, one job at a time: {baseline:.1f} s per job, {1 / baseline:.4f} jobs/s", flush=True)
    reward = None
    if options.reward == "8b":
        head = create_model(LlamaForSequenceClassification, {**LLAMA_8B, **small}, dtype, device, num_labels=1)
        reward = RewardEngine(head, head.config.vocab_size)
    elif options.reward == "0.6b":
        head = create_model(Qwen3ForSequenceClassification, {**QWEN_06B, **small}, dtype, device, num_labels=1)
        reward = RewardEngine(head, head.config.vocab_size)
    engine = build_engine(policy, frozenset(), 4096, EngineOptions(max_sequences=options.rows))
    warm_up(engine, reward, max(options.jobs, default=8), vocabulary)
    print(f"attention: {engine.attention}; capacity of {engine.capacity} tokens; ready after "
          f"{time.perf_counter() - started:.0f} s\n\n{HEADER}", flush=True)  # fmt: skip
    last = (0, 0.0)
    for jobs in options.jobs:
        # Upper bound: twice the jobs take at most twice the time.
        estimate = last[1] * jobs / last[0] if last[0] else 0.0
        if time.perf_counter() - started + estimate > options.seconds:
            print(f"| {jobs} | skipped: not enough time |", flush=True)
            continue
        last = (jobs, measure(engine, reward, jobs, vocabulary, baseline))
    if options.profile:
        profile(engine, 64, vocabulary)
    engine.close()
    if reward is not None:
        reward.close()


if __name__ == "__main__":
    main()
