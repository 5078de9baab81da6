"""Durations of tests: long tests run first, and a run reports its progress."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.durations import FILE, Durations, summarised
from tests.support.project import PytestProject

CONFTEST = """
from tests.support import progress
from tests.support.durations import Durations

def pytest_addoption(parser):
    progress.add_option(parser)

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(progress.Progress(config, Durations({"unit/test_it.py": 150.0})))
"""
TESTS = """
def test_one():
    pass

def test_two():
    assert False
"""


def items(*ids: str) -> list[Any]:
    """Return fake test items with these ids."""
    return [SimpleNamespace(nodeid=each) for each in ids]


def test_summarised_lists_long_tests_and_file_means() -> None:
    seconds = {"tests/a.py::one": 1.0, "tests/a.py::two": 2.0, "tests/a.py::long": 7.04, "tests/b.py::one": 0.25}
    assert summarised(seconds) == {"tests/a.py": 1.5, "tests/a.py::long": 7.0, "tests/b.py": 0.25}


def test_expected_falls_back_to_file_then_overall_mean() -> None:
    durations = Durations({"tests/a.py": 1.5, "tests/a.py::long": 7.0, "tests/b.py": 0.5})
    names = ("tests/a.py::long", "tests/a.py::new", "tests/new.py::new")
    assert [durations.expected(name) for name in names] == [7.0, 1.5, 1.0]


def test_order_puts_long_tests_first() -> None:
    durations = Durations({"a.py": 4.0, "a.py::long": 7.0, "b.py::longest": 9.0, "b.py": 0.1})
    found = items("a.py::one", "a.py::long", "b.py::two", "b.py::longest", "a.py::three")
    durations.order(found)
    assert [item.nodeid for item in found] == ["b.py::longest", "a.py::long", "a.py::one", "b.py::two", "a.py::three"]


def test_durations_file_names_existing_tests() -> None:
    root = FILE.parents[2]
    for name in Durations.load().names:
        file, _, test = name.partition("::")
        function = re.sub(r"\[.*", "", test).rpartition("::")[2]
        assert (root / file).exists(), f"{name}: regenerate the file with --store-durations"
        assert function in (root / file).read_text(), f"{name}: regenerate the file with --store-durations"


@pytest.mark.processes
@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_progress_is_shown_by_area(tmp_path: Path, processes: tuple[str, ...]) -> None:
    project = PytestProject(tmp_path, CONFTEST)
    (tmp_path / "suite" / "unit").mkdir(parents=True)
    (tmp_path / "suite" / "unit" / "test_it.py").write_text(TESTS)
    code, lines = project.run("suite", "-q", "--show-progress", *processes)
    assert code == 1
    number = "2 at once" if processes else "1 at once"
    assert any(re.match(rf"2 tests, {number}: about \d+ \w+ if", line) for line in lines)
    assert "FAILED suite/unit/test_it.py::test_two (call)" in lines
    assert re.fullmatch(r" *0:\d\d  unit 2/2  1 FAILED  done", next(line for line in lines if "done" in line))
