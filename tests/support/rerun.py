"""Rerun failed tests once after the run, each in its own process; a test that passes then is reported as flaky.

`--rerun-failed` enables it. The summary line, the exit status and the list of failures cover both runs. Nothing is
rerun if more than three tests failed or a test process crashed, because such failures are not flaky tests.
"""

import subprocess
import sys

import pytest

MAX_FAILED = 3
_PASSED, _FAILED = "passed", ("failed", "error")


def add_option(parser: pytest.Parser) -> None:
    """Add the option that enables reruns."""
    parser.addoption(
        "--rerun-failed",
        action="store_true",
        help=f"rerun failed tests once, each in its own process, if at most {MAX_FAILED} failed and no process crashed",
    )


class RerunFailed:
    """Plugin of the process that controls a run."""

    def __init__(self) -> None:
        self._session: pytest.Session | None = None
        self._crashed = False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, error: object | None) -> None:
        """Record that a process of pytest-xdist crashed."""
        self._crashed = self._crashed or error is not None

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
    ) -> None:
        """Rerun the failed tests, between the tracebacks of the failures and the summary line."""
        failed = _failed_tests(terminalreporter)
        if self._session is None or exitstatus != pytest.ExitCode.TESTS_FAILED or failed is None:
            return
        if self._crashed or len(failed) > MAX_FAILED:
            reason = (
                "a test process crashed" if self._crashed else f"{len(failed)} tests failed, more than {MAX_FAILED}"
            )
            terminalreporter.section("no reruns")
            terminalreporter.line(f"Nothing is rerun: {reason}.")
            return
        terminalreporter.section(f"{len(failed)} failed, rerun separately")
        flaky = [test for test in failed if _passes_in_rerun(test, config, terminalreporter)]
        for test in flaky:
            _count_as_flaky(test, terminalreporter)
        if flaky == failed:
            self._session.exitstatus = pytest.ExitCode.OK


def _failed_tests(reporter: pytest.TerminalReporter) -> list[str] | None:
    """Return the ids of the failed tests, or None if something other than a test failed."""
    reports = [report for outcome in _FAILED for report in reporter.stats.get(outcome, [])]
    if not reports or any(isinstance(report, pytest.CollectReport) for report in reports):
        return None
    return list(dict.fromkeys(report.nodeid for report in reports))


def _passes_in_rerun(test: str, config: pytest.Config, reporter: pytest.TerminalReporter) -> bool:
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
        reporter.line(f"flaky: {test} (a bug in the product or in the test)", yellow=True)
        return True
    reporter.line(f"failed again: {test}", red=True)
    reporter.line(done.stdout)
    return False


def _count_as_flaky(test: str, reporter: pytest.TerminalReporter) -> None:
    """Move the reports of a test from the failures to the passed and rerun ones."""
    reports_of_test: list[pytest.TestReport] = []
    for outcome in _FAILED:
        reports = reporter.stats.get(outcome, [])
        reports_of_test += [report for report in reports if report.nodeid == test]
        if remaining := [report for report in reports if report.nodeid != test]:
            reporter.stats[outcome] = remaining
        else:
            reporter.stats.pop(outcome, None)
    if not any(report.nodeid == test for report in reporter.stats.get(_PASSED, [])):
        reporter._add_stats(_PASSED, reports_of_test[:1])
    reporter._add_stats("rerun", reports_of_test[:1])
