"""Selection: fast tests start no process and import no model, and the longest tests run only on request."""

from pathlib import Path

import pytest

from tests.support.project import PytestProject

pytestmark = pytest.mark.processes

CONFTEST = """
import pytest
from tests.support import selection

def pytest_addoption(parser):
    selection.add_option(parser)

def pytest_configure(config):
    for marker in ("processes", "slow", "long"):
        config.addinivalue_line("markers", marker)
    options = config.option
    config.pluginmanager.register(selection.Selection(only_fast=options.fast, long=options.long))

@pytest.fixture
def system():
    pass

@pytest.fixture(scope="session")
def shared():
    import subprocess
    with selection.shared_server():
        subprocess.run(["true"])
"""
TESTS = """
import subprocess, pytest
from testing.forking import ForkedPython

def test_plain(shared):
    pass

@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_database(database):
    pass

def test_unmarked():
    subprocess.run(["true"])

def test_unmarked_fork():
    ForkedPython(["-c", "pass"], env=__import__("os").environ)

@pytest.mark.processes
def test_marked():
    subprocess.run(["true"])

def test_system(system):
    subprocess.run(["true"])

@pytest.mark.long
def test_long():
    pass

def test_model():
    import torch
"""


@pytest.fixture
def project(tmp_path: Path) -> PytestProject:
    return PytestProject(tmp_path, CONFTEST, test_it=TESTS)


def outcomes(lines: list[str]) -> dict[str, str]:
    """Return the outcome of each test by its name."""
    words = [line.partition("::test_")[2].split() for line in lines if line.startswith("test_it.py::")]
    return {name: outcome.lower() for name, outcome, *_ in words}


def test_unmarked_test_that_starts_process_fails(project: PytestProject) -> None:
    _, lines = project.run("-v", "--deselect", "test_it.py::test_model")
    assert outcomes(lines) == {
        "plain": "passed",
        "database[sqlite]": "passed",
        "database[postgresql]": "passed",
        "unmarked": "failed",
        "unmarked_fork": "failed",
        "marked": "passed",
        "system": "passed",
    }
    assert any("mark it with pytest.mark.processes" in line for line in lines)


def test_fast_option_selects_and_refuses_models(project: PytestProject) -> None:
    _, lines = project.run("-v", "--fast", "--deselect", "test_it.py::test_unmarked_fork")
    found = outcomes(lines)
    assert found == {"plain": "passed", "database[sqlite]": "passed", "unmarked": "failed", "model": "failed"}
    assert any("ImportError: fast tests must not import torch" in line for line in lines)


def test_long_option_runs_long_tests(project: PytestProject) -> None:
    assert outcomes(project.run("-v", "--long", "-k", "plain or long")[1]) == {"plain": "passed", "long": "passed"}
