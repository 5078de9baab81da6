"""Reruns: failed tests are rerun once, separately, and the summary line covers both runs."""

from pathlib import Path

import pytest

from tests.support.project import PytestProject

pytestmark = pytest.mark.processes

CONFTEST = """
from tests.support import rerun

def pytest_addoption(parser):
    rerun.add_option(parser)

def pytest_configure(config):
    if config.option.rerun_failed:
        config.pluginmanager.register(rerun.RerunFailed())
"""
TESTS = """
import os, pathlib, pytest

def nth_run(name):
    with open(name, "a") as file:
        file.write("x")
    return len(pathlib.Path(name).read_text())

def test_good():
    pass

@pytest.mark.parametrize("value", ["a b", "c::d"])
def test_flaky(value):
    assert nth_run(f"flaky-{value}") > 1

@pytest.fixture
def broken_once_at_the_end():
    yield
    assert nth_run("teardown") > 1

def test_flaky_teardown(broken_once_at_the_end):
    pass

def test_bad():
    assert nth_run("bad") == 0

@pytest.mark.parametrize("number", range(4))
def test_many(number):
    assert nth_run(f"many-{number}") > 1

def test_crash():
    if nth_run("crash") == 1:
        os._exit(1)
"""


class Project(PytestProject):
    """A project with the tests above."""

    def run_tests(self, tests: str, *options: str) -> tuple[int, list[str]]:
        """Run some of its tests, by name without `test_`."""
        return self.run(*(f"test_it.py::test_{name}" for name in tests.split()), *options)

    def runs(self, name: str) -> int:
        """Return how often a test was run."""
        return len((self.folder / name).read_text())


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path, CONFTEST, test_it=TESTS)


def test_rerun_reports_flaky_tests_without_failing_the_run(project: Project) -> None:
    code, lines = project.run_tests("good flaky flaky_teardown", "--rerun-failed", "-n", "2")
    assert code == 0
    assert " 4 passed, 3 rerun in " in lines[-1]
    flaky = {line.partition(" (a bug in")[0] for line in lines if line.startswith("flaky: ")}
    names = ("test_flaky[a b]", "test_flaky[c::d]", "test_flaky_teardown")
    assert flaky == {f"flaky: test_it.py::{name}" for name in names}
    assert any("def test_flaky(value):" in line for line in lines), "the traceback of the first failure is shown"


def test_rerun_fails_when_test_fails_again(project: Project) -> None:
    code, lines = project.run_tests("good bad flaky_teardown", "--rerun-failed")
    assert code == 1
    assert " 1 failed, 2 passed, 1 rerun in " in lines[-1]
    assert "failed again: test_it.py::test_bad" in lines
    assert project.runs("bad") == 2


def test_rerun_is_skipped_after_too_many_failures(project: Project) -> None:
    code, lines = project.run_tests("good many", "--rerun-failed")
    assert code == 1
    assert " 4 failed, 1 passed in " in lines[-1]
    assert "Nothing is rerun: 4 tests failed, more than 3." in lines
    assert [project.runs(f"many-{number}") for number in range(4)] == [1] * 4


def test_rerun_is_skipped_after_a_crash(project: Project) -> None:
    code, lines = project.run_tests("good crash", "--rerun-failed", "-n", "2")
    assert code == 1
    assert " 1 failed, 1 passed in " in lines[-1]
    assert "Nothing is rerun: a test process crashed." in lines
    assert project.runs("crash") == 1


def test_rerun_is_off_by_default(project: Project) -> None:
    code, lines = project.run_tests("flaky_teardown")
    assert code == 1
    assert " 1 passed, 1 error in " in lines[-1]
    assert project.runs("teardown") == 1
