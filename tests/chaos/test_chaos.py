"""A short chaos run on each database. `make chaos` runs longer ones."""

import threading

import pytest

from tests.chaos.points import LABELS
from tests.chaos.report import notes, table, violations
from tests.chaos.run import Plan, run

pytestmark = pytest.mark.processes


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_rows_after_faults_equal_an_undisturbed_run(database: str) -> None:
    plan = Plan(database, 20251124, 30.0, jobs_per_second=4.0, mean_gap=0.8, lease=2.0, each_fault_once=True)
    result = run(plan, threading.Event(), print)
    print(table(result))
    print(notes(result))
    assert not violations(result)
    assert sum(result.verdict.statuses.values()) > 10
    assert len(result.monkey.labels) > 5
    assert {label for labels in LABELS.values() for label in labels} >= set(result.monkey.labels)
