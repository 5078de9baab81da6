"""`python -m tests.chaos --minutes 60 --database postgresql --seed 1`: run chaos, then print a table.

Ctrl-C ends it early and prints what it has. Exits with 1 on any violation.
"""

import argparse
import sys
import time

from tests.chaos.report import notes, table, violations
from tests.chaos.run import Plan, run, stopped_by_signals


def main() -> int:
    """Run chaos, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Kill, stop and flush everything while jobs run; then verify every row."
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gap", type=float, default=5.0, help="mean seconds from one fault to the next")
    parser.add_argument("--jobs-per-second", type=float, default=1.5)
    arguments = parser.parse_args()
    plan = Plan(
        arguments.database,
        arguments.seed,
        arguments.minutes * 60,
        jobs_per_second=arguments.jobs_per_second,
        mean_gap=arguments.gap,
    )
    with stopped_by_signals() as stop_requested:
        result = run(plan, stop_requested, _log)
    print(table(result))
    print(notes(result), file=sys.stderr)
    return 1 if violations(result) else 0


def _log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
