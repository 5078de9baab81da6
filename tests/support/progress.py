"""Progress of a run by area of the suite, with an estimate of the remaining time.

`--show-progress` replaces the dots: one line that is rewritten on a terminal, and a line every half minute elsewhere.
The estimate comes from `durations.json`, scaled by the speed of this machine so far.
"""

import time
from collections import Counter
from collections.abc import Sequence

import pytest

from tests.support.durations import Durations

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 30.0
_CALIBRATION_SHARE = 0.25
"""Share of the expected work after which the measured speed of this machine is used."""


def add_option(parser: pytest.Parser) -> None:
    """Add the option that replaces the dots."""
    parser.addoption("--show-progress", action="store_true", help="show progress by area and the remaining time")


class Progress:
    """Plugin of the process that controls a run."""

    def __init__(self, config: pytest.Config, durations: Durations) -> None:
        self._config = config
        self._durations = durations
        self._total: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._expected = self._expected_done = 0.0
        self._began = self._shown = time.monotonic()
        self._failed = 0

    @property
    def _reporter(self) -> pytest.TerminalReporter:
        reporter = self._config.pluginmanager.getplugin("terminalreporter")
        assert isinstance(reporter, pytest.TerminalReporter)
        return reporter

    @property
    def _processes(self) -> int:
        return len(getattr(self._config.option, "tx", None) or ["this process"])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count the tests of a run in this process."""
        if session.items:
            self._begin([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """Count the tests of a run in several processes. Each process collects the same tests."""
        if not self._total:
            self._begin(ids)

    def _begin(self, tests: Sequence[str]) -> None:
        self._began = self._shown = time.monotonic()
        self._total = Counter(map(_area, tests))
        self._expected = sum(map(self._durations.expected, tests))
        minutes = self._expected / self._processes / 60
        self._reporter.ensure_newline()
        self._reporter.line(
            f"{len(tests)} tests, {self._processes} at once: {_about(minutes)} if nothing else runs on this machine"
        )

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """Suppress the progress letters, which the lines of this plugin replace."""
        if report.when == "call" or report.skipped:
            return report.outcome, "", ""
        return "error" if report.failed else "", "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a finished test, and print the name of a failed one."""
        if report.failed:
            self._failed += 1
            self._reporter.ensure_newline()
            self._reporter.line(f"FAILED {report.nodeid} ({report.when})", red=True)
        if report.when == "teardown":
            self._done[_area(report.nodeid)] += 1
            self._expected_done += self._durations.expected(report.nodeid)
        pause = _TERMINAL_SECONDS if self._reporter.isatty else _LOG_SECONDS
        if time.monotonic() - self._shown >= pause:
            self._show()

    def pytest_sessionfinish(self) -> None:
        """Show the final counts above the failures."""
        if self._total:
            self._show()
            self._reporter.ensure_newline()

    def _show(self) -> None:
        self._shown = time.monotonic()
        seconds = self._shown - self._began
        areas = "  ".join(f"{area} {self._done[area]}/{total}" for area, total in sorted(self._total.items()))
        failed = f"  {self._failed} FAILED" if self._failed else ""
        line = f"{int(seconds // 60):3}:{int(seconds % 60):02}  {areas}{failed}  {self._left(seconds)}"
        if self._reporter.isatty:
            self._reporter.rewrite(line, erase=True)
        else:
            self._reporter.ensure_newline()
            self._reporter.line(line)

    def _left(self, seconds: float) -> str:
        if self._done == self._total:
            return "done"
        left = self._expected - self._expected_done
        if self._expected_done > _CALIBRATION_SHARE * self._expected:
            return f"{_about(left * seconds / self._expected_done / 60)} left"
        return f"{_about((self._expected / self._processes - seconds) / 60)} left"


def _area(test: str) -> str:
    """Return the folder below `tests` that contains the test."""
    parts = test.partition("::")[0].split("/")
    return parts[1] if len(parts) > 2 else parts[0]


def _about(minutes: float) -> str:
    return f"about {round(minutes)} min" if minutes >= 1.5 else f"about {max(10, round(minutes * 6) * 10)} s"
