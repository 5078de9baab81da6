"""The local engine on CPU, beside three other ways to answer the same calls of the same model.

D1-N5 jobs with random weights and tokens, whose answers have forced lengths. Every figure is a ratio to one job at a
time by `generate`, measured in the same run before and after the rest: how far these two lie apart is the noise. The
process's own CPU time is what other work on the machine moves least; one thread is the default for the same reason.

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
    job,
    llama,
    measured,
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

Way = Callable[[Progress], None]

ENGINE = "this engine"
HEADER = (
    "| model | jobs | way | tokens | CPU s | wall s | tokens / CPU s | to one at a time, CPU | the same, wall "
    "| slowest / mean |\n|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
)


def run(way: Way, jobs: int, prompts: str = "conversation", first: int = 0) -> Run:
    """So many jobs at once."""
    gc.collect()
    return measured([job(first + i, prompts) for i in range(jobs)], way)


def compare(name: str, jobs: list[int], longest: float) -> StepEngine:
    """Print the table of one model; gives its engine, warm."""
    model = llama(name)
    ours = copy.deepcopy(model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{name}: {parameters / 1e6:.0f} million parameters, float32, {torch.get_num_threads()} thread(s)\n")
    few = 2 if parameters < 50e6 else 1
    run(one_at_a_time(model), 1, first=999)
    before = run(one_at_a_time(model), few)
    _ended("one at a time, `generate`, before the rest", few, before)
    engine = start(ours)
    run(our_engine(engine), 1, first=999)
    ways: dict[str, Callable[[int], Way]] = {
        ENGINE: lambda _: our_engine(engine),
        "static batches": lambda _: static_batches(model),
        "transformers' continuous batching": lambda count: continuous_batching(copy.deepcopy(model), count),
    }
    runs: dict[tuple[str, int], Run | float] = {}
    for way, make in ways.items():
        # A way that has not run yet is taken for as fast as one at a time.
        seconds = before.cpu / few
        for count in jobs:
            if seconds * count > longest:
                runs[way, count] = seconds * count
                continue
            if way != ENGINE and count == 1 and not few > 1:
                continue  # a job alone of a large model tells no more than four do
            line = run(make(count), count, first=1000 * count)
            runs[way, count] = line
            seconds = line.cpu / count
            _ended(way, count, line)
            if way == ENGINE:
                held = engine.held * _slot_bytes(model) / 2**20
                print(f"{count} jobs: {held:.0f} MiB of keys and values held, {peak_mib():.0f} MiB peak of the process")
    after = run(one_at_a_time(model), few)
    _ended("one at a time, `generate`, after the rest", few, after)
    base = Run(before.tokens + after.tokens, before.cpu + after.cpu, before.wall + after.wall, ())
    apart = abs((before.tokens / before.cpu) / (after.tokens / after.cpu) - 1)
    print(f"\n{HEADER}")
    _line(name, f"{few} of many", "one at a time, `generate`", base, base)
    for (way, count), known in sorted(runs.items(), key=lambda item: item[0][1]):
        if isinstance(known, Run):
            _line(name, str(count), way, known, base)
        else:
            print(f"| {name} | {count} | {way} | left out: about {known:.0f} s | | | | | | |")
    print(f"\nOne at a time, before and after all this: {apart:.0%} apart in tokens / CPU s.", flush=True)
    return engine


def _ended(way: str, jobs: int, line: Run) -> None:
    """The table comes at the end, perhaps an hour later: what is known by then."""
    print(f"{way}, {jobs} jobs: {line.tokens} tokens, {line.cpu:.1f} CPU s, {line.wall:.1f} s", flush=True)


def _line(name: str, jobs: str, way: str, line: Run, base: Run) -> None:
    cpu = (line.tokens / line.cpu) / (base.tokens / base.cpu)
    wall = (line.tokens / line.wall) / (base.tokens / base.wall)
    fair = f"{max(line.ends) / statistics.mean(line.ends):.2f}" if line.ends else "-"
    print(
        f"| {name} | {jobs} | {way} | {line.tokens} | {line.cpu:.1f} | {line.wall:.1f} | {line.tokens / line.cpu:.0f} "
        f"| {cpu:.2f}x | {wall:.2f}x | {fair} |",
        flush=True,
    )


def _slot_bytes(model: Any) -> int:
    config = model.config
    each = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return int(2 * each * config.num_hidden_layers * model.dtype.itemsize)


def prompt_sets(engine: StepEngine, jobs: int) -> None:
    """What sharing saves, for each of the two prompt sets."""
    print(
        "\n| prompt set | prompt tokens as `generate` reads them | each prompt once | read by the engine | saved "
        "| tokens / CPU s |\n|---|---:|---:|---:|---:|---:|"
    )
    for prompts in ("conversation", "separate"):
        asked: list[tuple[int, int]] = []
        reused: list[int] = []
        way = our_engine(engine, reused)
        line = measured([_noted(job(5000 + i, prompts), asked) for i in range(jobs)], way)
        each, once = sum(n * length for n, length in asked), sum(length for _, length in asked)
        read = once - sum(reused)
        print(
            f"| {prompts} | {each} | {once} | {read} | {1 - read / each:.0%} | {line.tokens / line.cpu:.0f} |",
            flush=True,
        )


def _noted(work: Any, asked: list[tuple[int, int]]) -> Any:
    """The same job; each call's n and prompt length are noted."""
    answers = None
    while True:
        try:
            ask = work.send(answers)
        except StopIteration:
            return
        asked.append((ask.n, len(ask.prompt)))
        answers = yield ask


def time_of_a_step(engine: StepEngine, rows: int = 64) -> None:
    """Where a step's time goes at so many rows, four samples a prompt."""
    _write(engine, rows, 4)
    before, steps = dict(engine.seconds), engine.steps
    _write(engine, rows, 48)
    steps = engine.steps - steps
    plain = {name: (engine.seconds[name] - before[name]) / steps for name in before}
    profile = cProfile.Profile()
    step = engine._step
    engine._step = lambda: profile.runcall(step)  # type: ignore[method-assign]
    _write(engine, rows, 48)
    engine._step = step  # type: ignore[method-assign]
    parts = _parts(profile)
    whole = sum(parts.values())
    print(
        f"\nA step at {rows} rows: {1000 * sum(plain.values()):.1f} ms, of which scheduling "
        f"{plain['schedule'] / sum(plain.values()):.1%}. Under cProfile, which makes Python dearer than it is:\n"
        f"\n| part | share |\n|---|---:|"
    )
    for part, seconds in parts.items():
        print(f"| {part} | {seconds / whole:.1%} |", flush=True)


def _parts(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds by part; a call into C counts for the Python that made it."""
    tensors, own = "the model's layers", "the engine's own Python: scheduling, attention's cutting, bookkeeping"
    parts = {tensors: 0.0, "attention's tensor calls": 0.0, "sampling": 0.0, own: 0.0}
    for (file, _, name), (_, _, seconds, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        if file != "~":
            ours = "tpo/backends/local" in file and not file.endswith("sampling.py")
            parts[own if ours else "sampling" if file.endswith("sampling.py") else tensors] += seconds
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


def _write(engine: StepEngine, rows: int, length: int) -> None:
    chance = random.Random(rows + length)
    prompts = [tuple(chance.randrange(VOCABULARY) for _ in range(100)) for _ in range(rows // 4)]
    for future in [engine.submit(TokenRequest(p, (1, 2, 3, 4), TEMPERATURE, TOP_P, length)) for p in prompts]:
        future.result()


def rewards(jobs: int) -> None:
    """Responses scored one by one, job by job, and all jobs at once; lengths between 80 and 240."""
    network = random_model(LlamaForSequenceClassification, "25M", num_labels=1)
    engine = RewardEngine(network, VOCABULARY)
    chance = random.Random(0)
    talks = [
        [[chance.randrange(VOCABULARY) for _ in range(chance.randint(80, 240))] for _ in range(N)] for _ in range(jobs)
    ]
    engine.submit(talks[0]).result()

    def one_by_one() -> None:
        for talk in talks:
            for conversation in talk:
                engine.submit([conversation]).result()

    def by_job() -> None:
        for talk in talks:
            engine.submit(talk).result()

    def at_once() -> None:
        for future in [engine.submit(talk) for talk in talks]:
            future.result()

    base = 0.0
    print("\n| rewards of a 25M classifier | tokens / CPU s | to one by one |\n|---|---:|---:|")
    for name, way in (("one by one", one_by_one), ("job by job", by_job), (f"{jobs} jobs at once", at_once)):
        cpu = time.process_time()
        way()
        rate = sum(len(c) for talk in talks for c in talk) / (time.process_time() - cpu)
        base = base or rate
        print(f"| {name} | {rate:.0f} | {rate / base:.2f}x |", flush=True)
    engine.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The local engine on CPU, beside other ways to answer the same calls.")
    parser.add_argument("--quick", action="store_true", help="the 25M model at 1 and 8 jobs, and less of the rest")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=None)
    parser.add_argument("--jobs", nargs="+", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--longest", type=float, default=None, help="CPU seconds; lines that would take longer are left out"
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
