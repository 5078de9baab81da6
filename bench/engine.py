"""Comparison of the local engine on CPU with three other strategies for the same calls of the same model.

The jobs are D1-N5 with random weights and tokens; completions have forced lengths. Every figure is a ratio to one job
at a time by `generate`, measured in the same run before and after the rest. The difference between these two is the
noise. CPU time of the process is used because other work on the machine affects it least; for the same reason one
thread is the default.

    python -m bench.engine [--quick] [--models 25M 150M] [--jobs 1 4 16 64] [--threads 1] [--longest 60]
"""

import argparse
import copy
import cProfile
import gc
import os
import pstats
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import LlamaForSequenceClassification

from bench.strategies import (
    SHAPES,
    TEMPERATURE,
    TOP_P,
    VOCABULARY,
    N,
    Progress,
    Run,
    continuous_batching,
    create_llama,
    job,
    measure,
    one_at_a_time,
    our_engine,
    peak_mib,
    random_model,
    start,
    static_batches,
)
from tpo.backends.local.engine import StepEngine
from tpo.backends.local.requests import TokenRequest
from tpo.backends.local.reward_engine import RewardEngine

Strategy = Callable[[Progress], None]

ENGINE = "this engine"
HEADER = (
    "| model | jobs | strategy | tokens | CPU s | wall s | tokens / CPU s | CPU ratio to one at a time | wall ratio "
    "| slowest / mean |\n|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
)


def run(strategy: Strategy, jobs: int, prompts: str = "conversation", first: int = 0) -> Run:
    """Run `jobs` jobs concurrently with a strategy."""
    gc.collect()
    return measure([job(first + i, prompts) for i in range(jobs)], strategy)


def compare(name: str, jobs: list[int], longest: float) -> StepEngine:
    """Print the table of one model. Returns its engine, warmed up."""
    model = create_llama(name)
    engine_model = copy.deepcopy(model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{name}: {parameters / 1e6:.0f} million parameters, float32, {torch.get_num_threads()} thread(s)\n")
    few = 2 if parameters < 50e6 else 1
    run(one_at_a_time(model), 1, first=999)
    before = run(one_at_a_time(model), few)
    _print_progress("one at a time, `generate`, before the rest", few, before)
    engine = start(engine_model)
    run(our_engine(engine), 1, first=999)
    strategies: dict[str, Callable[[int], Strategy]] = {
        ENGINE: lambda _: our_engine(engine),
        "static batches": lambda _: static_batches(model),
        "transformers' continuous batching": lambda count: continuous_batching(copy.deepcopy(model), count),
    }
    runs: dict[tuple[str, int], Run | float] = {}
    for strategy, create in strategies.items():
        # A strategy that has not run yet is assumed to be as fast as one at a time.
        seconds = before.cpu / few
        for count in jobs:
            if seconds * count > longest:
                runs[strategy, count] = seconds * count
                continue
            if strategy != ENGINE and count == 1 and not few > 1:
                continue  # a single job of a large model shows no more than four jobs do
            result = run(create(count), count, first=1000 * count)
            runs[strategy, count] = result
            seconds = result.cpu / count
            _print_progress(strategy, count, result)
            if strategy == ENGINE:
                held = engine.used_slots * _slot_bytes(model) / 2**20
                print(f"{count} jobs: {held:.0f} MiB of keys and values held, {peak_mib():.0f} MiB peak of the process")
    after = run(one_at_a_time(model), few)
    _print_progress("one at a time, `generate`, after the rest", few, after)
    base = Run(before.tokens + after.tokens, before.cpu + after.cpu, before.wall + after.wall, ())
    difference = abs((before.tokens / before.cpu) / (after.tokens / after.cpu) - 1)
    print(f"\n{HEADER}")
    _print_row(name, f"{few} in sequence", "one at a time, `generate`", base, base)
    for (strategy, count), known in sorted(runs.items(), key=lambda item: item[0][1]):
        if isinstance(known, Run):
            _print_row(name, str(count), strategy, known, base)
        else:
            print(f"| {name} | {count} | {strategy} | skipped: about {known:.0f} s | | | | | | |")
    print(
        f"\nNoise: one at a time before and after all this differs by {difference:.0%} in tokens / CPU s.", flush=True
    )
    return engine


def _print_progress(strategy: str, jobs: int, result: Run) -> None:
    """Print a result at once: the table comes at the end, perhaps an hour later."""
    print(f"{strategy}, {jobs} jobs: {result.tokens} tokens, {result.cpu:.1f} CPU s, {result.wall:.1f} s", flush=True)


def _print_row(name: str, jobs: str, strategy: str, result: Run, base: Run) -> None:
    rate = result.tokens / result.cpu
    cpu = rate / (base.tokens / base.cpu)
    wall = (result.tokens / result.wall) / (base.tokens / base.wall)
    slowest = f"{max(result.ends) / statistics.mean(result.ends):.2f}" if result.ends else "-"
    print(
        f"| {name} | {jobs} | {strategy} | {result.tokens} | {result.cpu:.1f} | {result.wall:.1f} | {rate:.0f} "
        f"| {cpu:.2f}x | {wall:.2f}x | {slowest} |",
        flush=True,
    )


def _slot_bytes(model: Any) -> int:
    config = model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return int(2 * width * config.num_hidden_layers * model.dtype.itemsize)


def prompt_sets(engine: StepEngine, jobs: int) -> None:
    """Print how many prompt tokens prefix sharing saves, for each of two prompt sets."""
    print(
        "\n| prompt set | prompt tokens for `generate` | each prompt once | prefilled by the engine | saved "
        "| tokens / CPU s |\n|---|---:|---:|---:|---:|---:|"
    )
    for prompts in ("conversation", "separate"):
        recorded: list[tuple[int, int]] = []
        reused: list[int] = []
        strategy = our_engine(engine, reused)
        result = measure([_record_calls(job(5000 + i, prompts), recorded) for i in range(jobs)], strategy)
        repeated, distinct = sum(n * length for n, length in recorded), sum(length for _, length in recorded)
        prefilled = distinct - sum(reused)
        saved = 1 - prefilled / repeated
        print(
            f"| {prompts} | {repeated} | {distinct} | {prefilled} | {saved:.0%} | {result.tokens / result.cpu:.0f} |",
            flush=True,
        )


def _record_calls(work: Any, recorded: list[tuple[int, int]]) -> Any:
    """Run the same job, and record each call's n and prompt length."""
    completions = None
    while True:
        try:
            call = work.send(completions)
        except StopIteration:
            return
        recorded.append((call.n, len(call.prompt)))
        completions = yield call


def time_of_a_step(engine: StepEngine, rows: int = 64) -> None:
    """Print where the time of a step with `rows` rows goes, with four samples per prompt."""
    _generate(engine, rows, 4)
    before, steps = dict(engine.phase_seconds), engine.steps
    _generate(engine, rows, 48)
    steps = engine.steps - steps
    plain = {name: (engine.phase_seconds[name] - before[name]) / steps for name in before}
    profile = cProfile.Profile()
    step = engine._step
    engine._step = lambda: profile.runcall(step)  # type: ignore[method-assign]
    _generate(engine, rows, 48)
    engine._step = step  # type: ignore[method-assign]
    parts = _seconds_by_part(profile)
    total = sum(parts.values())
    print(
        f"\nA step at {rows} rows: {1000 * sum(plain.values()):.1f} ms, of which scheduling "
        f"{plain['schedule'] / sum(plain.values()):.1%}. Under cProfile, which overstates the share of Python:\n"
        f"\n| part | share |\n|---|---:|"
    )
    for part, seconds in parts.items():
        print(f"| {part} | {seconds / total:.1%} |", flush=True)


def _seconds_by_part(profile: cProfile.Profile) -> dict[str, float]:
    """Return seconds by part. A call into C counts for the Python code that made it."""
    tensors, own = "the model's layers", "the engine's own Python: scheduling, splitting attention, bookkeeping"
    parts = {tensors: 0.0, "attention's tensor calls": 0.0, "sampling": 0.0, own: 0.0}
    for (file, _, name), (_, _, seconds, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file != "~":
            in_engine = "tpo/backends/local" in file and not file.endswith("sampling.py")
            parts[own if in_engine else "sampling" if file.endswith("sampling.py") else tensors] += seconds
            continue
        for (caller, _, _), (_, _, part, _) in callers.items():
            if caller.endswith("sampling.py"):
                parts["sampling"] += part
            elif caller.endswith("local/attention.py"):
                parts["attention's tensor calls"] += part
            elif "tpo/backends/local" in caller and "torch" not in name and "Tensor" not in name:
                parts[own] += part
            else:
                parts[tensors] += part
    return parts


def _generate(engine: StepEngine, rows: int, length: int) -> None:
    """Generate `length` tokens in each of `rows` rows, four samples per prompt."""
    source = random.Random(rows + length)
    prompts = [tuple(source.randrange(VOCABULARY) for _ in range(100)) for _ in range(rows // 4)]
    for future in [engine.submit(TokenRequest(p, (1, 2, 3, 4), TEMPERATURE, TOP_P, length)) for p in prompts]:
        future.result()


def rewards(jobs: int) -> None:
    """Time the scoring of conversations of 80 to 240 tokens: one by one, job by job, and all jobs at once."""
    network = random_model(LlamaForSequenceClassification, "25M", num_labels=1)
    engine = RewardEngine(network, VOCABULARY)
    source = random.Random(0)
    conversations = [
        [[source.randrange(VOCABULARY) for _ in range(source.randint(80, 240))] for _ in range(N)] for _ in range(jobs)
    ]
    engine.submit(conversations[0]).result()

    def one_by_one() -> None:
        for of_job in conversations:
            for conversation in of_job:
                engine.submit([conversation]).result()

    def by_job() -> None:
        for of_job in conversations:
            engine.submit(of_job).result()

    def at_once() -> None:
        for future in [engine.submit(of_job) for of_job in conversations]:
            future.result()

    base = 0.0
    print("\n| rewards of a 25M classifier | tokens / CPU s | ratio to one by one |\n|---|---:|---:|")
    for name, score in (("one by one", one_by_one), ("job by job", by_job), (f"{jobs} jobs at once", at_once)):
        cpu = time.process_time()
        score()
        rate = sum(len(c) for of_job in conversations for c in of_job) / (time.process_time() - cpu)
        base = base or rate
        print(f"| {name} | {rate:.0f} | {rate / base:.2f}x |", flush=True)
    engine.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Compare the local engine on CPU with other strategies.")
    parser.add_argument("--quick", action="store_true", help="only the 25M model at 1 and 8 jobs, and less of the rest")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=None)
    parser.add_argument("--jobs", nargs="+", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--longest", type=float, default=None, help="limit in CPU seconds; rows that would take longer are skipped"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    models = options.models or (["25M"] if options.quick else list(SHAPES))
    jobs = options.jobs or ([1, 8] if options.quick else [1, 4, 16, 64])
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {options.threads} thread(s); "
        f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for name in models:
        engine = compare(name, jobs, options.longest or 60.0)
        if name == models[0]:
            time_of_a_step(engine)
            prompt_sets(engine, 2 if options.quick else 8)
        engine.close()
        gc.collect()
    rewards(2 if options.quick else 8)


if __name__ == "__main__":
    main()
