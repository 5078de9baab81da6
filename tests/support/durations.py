"""How long each test usually takes: it decides which tests run first, and how much time a run is expected to take.

`durations.json` holds the seconds of every test that takes long and the mean of each file's other tests, measured on
two cores. `--store-durations` writes it after a run of all tests.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("durations.json")
LONG = 5.0
"""Seconds from which on a test has a line of its own and is run among the first."""


def add_option(parser: pytest.Parser) -> None:
    """Add the option that writes the file."""
    parser.addoption("--store-durations", action="store_true", help=f"write the seconds of this run to {FILE.name}")


class Durations:
    """The usual seconds of tests and of files."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = seconds
        files = [value for name, value in seconds.items() if "::" not in name]
        self._usual = sum(files) / len(files) if files else 0.1

    @classmethod
    def load(cls) -> "Durations":
        """Read the file of this project."""
        return cls(json.loads(FILE.read_text()))

    @property
    def names(self) -> list[str]:
        """The tests and files that are known."""
        return list(self._seconds)

    def expected(self, test: str) -> float:
        """Return how many seconds a test is expected to take, by its id."""
        file = test.partition("::")[0]
        return self._seconds.get(test, self._seconds.get(file, self._usual))

    def order(self, items: list[pytest.Item]) -> None:
        """Put the long tests first, the longest at the head, and leave the others as they are."""
        items.sort(key=lambda item: -seconds if (seconds := self.expected(item.nodeid)) >= LONG else 0.0)


class StoreDurations:
    """The plugin that measures a run and writes the file, for the process that controls the run."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up set-up, call and tear-down of each test."""
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write what a run without failures has taken."""
        if exitstatus == pytest.ExitCode.OK:
            FILE.write_text(json.dumps(summarised(self._seconds), indent=0) + "\n")


def summarised(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the long tests by their ids, and the mean of each file's other tests."""
    long = {test: round(value, 1) for test, value in seconds.items() if value >= LONG}
    others: defaultdict[str, list[float]] = defaultdict(list)
    for test, value in seconds.items():
        if test not in long:
            others[test.partition("::")[0]].append(value)
    means = {file: round(sum(values) / len(values), 3) for file, values in others.items()}
    return dict(sorted({**means, **long}.items()))
