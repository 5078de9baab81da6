"""Run the tests that failed once more, each alone, after the run: what passes then is flaky, not broken.

`--rerun-failed` switches it on. The closing line, the exit status and the list of failures speak for both runs. Nothing
is run again where more than three tests failed or a test process crashed: that is no rare accident.
"""

import subprocess
import sys

import pytest

MOST_FAILED = 3
_PASSED, _FAILED = "passed", ("failed", "error")


def add_option(parser: pytest.Parser) -> None:
    """Add the option that switches reruns on."""
    parser.addoption(
        "--rerun-failed",
        action="store_true",
        help=f"run failed tests once more, each alone, where no more than {MOST_FAILED} failed and no process crashed",
    )


class RerunFailed:
    """The plugin, for the process that controls a run."""

    def __init__(self) -> None:
        self._session: pytest.Session | None = None
        self._crashed = False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, error: object | None) -> None:
        """Note that a process of pytest-xdist crashed."""
        self._crashed = self._crashed or error is not None

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
    ) -> None:
        """Run what failed again, between the tracebacks of the failures and the closing line."""
        failed = _failed_tests(terminalreporter)
        if self._session is None or exitstatus != pytest.ExitCode.TESTS_FAILED or failed is None:
            return
        if self._crashed or len(failed) > MOST_FAILED:
            reason = "a test process crashed" if self._crashed else f"{len(failed)} tests failed, over {MOST_FAILED}"
            terminalreporter.section("no reruns")
            terminalreporter.line(f"Nothing is run again: {reason}.")
            return
        terminalreporter.section(f"{len(failed)} failed, run again alone")
        flaky = [test for test in failed if _passes_alone(test, config, terminalreporter)]
        for test in flaky:
            _count_as_flaky(test, terminalreporter)
        if flaky == failed:
            self._session.exitstatus = pytest.ExitCode.OK


def _failed_tests(reporter: pytest.TerminalReporter) -> list[str] | None:
    """Return the ids of the tests that failed, or None if something other than a test did."""
    reports = [report for outcome in _FAILED for report in reporter.stats.get(outcome, [])]
    if not reports or any(isinstance(report, pytest.CollectReport) for report in reports):
        return None
    return list(dict.fromkeys(report.nodeid for report in reports))


def _passes_alone(test: str, config: pytest.Config, reporter: pytest.TerminalReporter) -> bool:
    reporter.line(f"{test} ...")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", test],
        cwd=config.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    last_line = done.stdout.rstrip().rpartition("\n")[2]
    if done.returncode == pytest.ExitCode.OK and " passed" in last_line:
        reporter.line(f"flaky: {test} (a bug to find, in the product or in the test)", yellow=True)
        return True
    reporter.line(f"failed again: {test}", red=True)
    reporter.line(done.stdout)
    return False


def _count_as_flaky(test: str, reporter: pytest.TerminalReporter) -> None:
    """Move the reports of a test from the failures to what passed and was rerun."""
    moved: list[pytest.TestReport] = []
    for outcome in _FAILED:
        reports = reporter.stats.get(outcome, [])
        moved += [report for report in reports if report.nodeid == test]
        if kept := [report for report in reports if report.nodeid != test]:
            reporter.stats[outcome] = kept
        else:
            reporter.stats.pop(outcome, None)
    if not any(report.nodeid == test for report in reporter.stats.get(_PASSED, [])):
        reporter._add_stats(_PASSED, moved[:1])
    reporter._add_stats("rerun", moved[:1])
