"""Usual durations of tests, which decide the order of tests and the estimated time of a run.

`durations.json` holds the seconds of each long test and the mean of the other tests of each file, measured on two
cores. `--store-durations` writes it after a run of all tests.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("durations.json")
LONG = 5.0
"""Seconds from which a test is listed separately and run among the first."""


def add_option(parser: pytest.Parser) -> None:
    """Add the option that writes `durations.json`."""
    parser.addoption("--store-durations", action="store_true", help=f"write the durations of this run to {FILE.name}")


class Durations:
    """Usual durations of tests and files, in seconds."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = seconds
        files = [value for name, value in seconds.items() if "::" not in name]
        self._mean = sum(files) / len(files) if files else 0.1

    @classmethod
    def load(cls) -> "Durations":
        """Read the durations of this project."""
        return cls(json.loads(FILE.read_text()))

    @property
    def names(self) -> list[str]:
        """The ids of the tests and the paths of the files that have a duration."""
        return list(self._seconds)

    def expected(self, test: str) -> float:
        """Return the expected seconds of a test, by its id.

        A test that is not listed takes the mean of its file, or of all files if the file is new.
        """
        file = test.partition("::")[0]
        return self._seconds.get(test, self._seconds.get(file, self._mean))

    def order(self, items: list[pytest.Item]) -> None:
        """Sort the long tests to the front, longest first, and keep the order of the others."""
        items.sort(key=lambda item: -seconds if (seconds := self.expected(item.nodeid)) >= LONG else 0.0)


class StoreDurations:
    """Plugin of the controlling process that measures a run and writes `durations.json`."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the setup, call and teardown of each test."""
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the durations if no test failed."""
        if exitstatus == pytest.ExitCode.OK:
            FILE.write_text(json.dumps(summarised(self._seconds), indent=0) + "\n")


def summarised(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each long test by id, and the mean of the other tests by file."""
    long = {test: round(value, 1) for test, value in seconds.items() if value >= LONG}
    others: defaultdict[str, list[float]] = defaultdict(list)
    for test, value in seconds.items():
        if test not in long:
            others[test.partition("::")[0]].append(value)
    means = {file: round(sum(values) / len(values), 3) for file, values in others.items()}
    return dict(sorted({**means, **long}.items()))
