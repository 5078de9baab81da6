"""Measure the demo models through the product's own loop and engine: `python -m demo.evaluate`.

Writes RESULTS.md, results.png and log.jsonl, which has one line per run in a fixed order. Exits with 1 if a requirement
does not hold. With `--transcripts N` it only writes the first N runs of the log to transcripts-N.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tpo.backends import load_policy, load_reward_model
from tpo.backends.spec import ModelSpec, RewardSpec
from tpo.core.ports import RewardModel
from tpo.settings import Settings

from demo import experiment, report, transcripts
from demo.experiment import ARMS, BEST_OF_UNSEEN, SEEDS, TPO, UNSEEN_ARMS, Models, Run
from demo.grammar import Facts
from demo.measures import results
from demo.settings import FOLDER, MODELS

TIMED_JOBS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write transcripts. Returns 1 if a requirement does not hold."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(device="cpu", dtype="float32")
    policy = load_policy(ModelSpec(str(options.models / "policy")), settings)
    reward = load_reward_model(RewardSpec(str(options.models / "reward")), settings)
    try:
        models = Models(policy, reward)
        if options.transcripts:
            return write_transcripts(models, options.transcripts, options.out)
        return measure(models, reward, options.out)
    finally:
        policy.close()
        reward.close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options of the command."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description="Measure the demo models.")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that holds policy/ and reward/")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument(
        "--transcripts",
        type=int,
        metavar="N",
        choices=range(1, experiment.QUERIES + 1),
        help="write only the first N tpo runs, in Markdown",
    )
    return parser.parse_args(arguments)


def write_transcripts(models: Models, count: int, out: Path) -> int:
    """Write the first runs of the log in Markdown.

    All runs of their arm and seed are made, because the other requests in a batch affect rounding.
    """
    runs = experiment.run_arm(models, TPO, experiment.held_out_facts(), SEEDS[0])
    (out / f"transcripts-{count}.md").write_text(transcripts.page(runs[:count]), encoding="utf-8")
    return 0


def measure(models: Models, reward: RewardModel, out: Path) -> int:
    """Run all arms on both held-out sets and write the report. Returns 1 if a requirement does not hold."""
    facts = experiment.held_out_facts()
    runs = run_arms(models, "held out", tuple(ARMS), facts)
    unseen = run_arms(models, "unseen", UNSEEN_ARMS, experiment.unseen_facts(), BEST_OF_UNSEEN)
    measured = results(runs, unseen, reward, seconds_a_job(models, facts))
    with (out / "log.jsonl").open("w", encoding="utf-8") as log:
        for messages, arms in (("held out", runs), ("unseen", unseen)):
            log.writelines(
                f"{transcripts.log_line(messages, arm, run)}\n" for arm, of_arm in arms.items() for run in of_arm
            )
    page = report.page(measured)
    (out / "RESULTS.md").write_text(page, encoding="utf-8")
    report.draw(measured, out / "results.png")
    print(page)
    return 0 if all(bar.holds for bar in report.bars(measured)) else 1


def run_arms(
    models: Models, messages: str, arms: Sequence[str], facts: Sequence[Facts], best_of: int = experiment.BEST_OF
) -> dict[str, list[Run]]:
    """Run every message in every arm, with every seed."""
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    for seed in SEEDS:
        for arm in arms:
            started = time.monotonic()
            runs[arm] += experiment.run_arm(models, arm, facts, seed, best_of)
            print(f"{messages}, seed {seed}, {arm}: {time.monotonic() - started:.0f} s", flush=True)
    return runs


def seconds_a_job(models: Models, facts: Sequence[Facts]) -> float:
    """Measure the seconds of one job while no other runs: the median of TIMED_JOBS."""
    seconds = []
    for message in facts[:TIMED_JOBS]:
        started = time.monotonic()
        experiment.run_arm(models, TPO, [message], seed=len(SEEDS))
        seconds.append(time.monotonic() - started)
    return median(seconds)


if __name__ == "__main__":
    sys.exit(main())
