"""Selection of tests: all but the longest by default, also those with `--long`, only the fast ones with `--fast`.

Fast tests need no model, start no process of their own, and run on SQLite. The needs of a test are read from its
fixtures and markers. Every run enforces them: a test that starts a process without the marker `processes` fails.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SYSTEMS = {"system", "sqlite_system", "shared_system", "module_api", "served"}
"""Fixtures that start processes for a test or a module."""

_MODELS = ("torch", "transformers")
_MODEL_TESTS = {"engine", "remote", "test_backends.py", "test_demo_grammar.py"}
"""Folders and files of tests that import these packages."""


def add_option(parser: pytest.Parser) -> None:
    """Add the options that select tests."""
    parser.addoption("--fast", action="store_true", help="run only tests that need no model and start no process")
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")


class Selection:
    """Plugin of every test process that marks, selects and watches tests."""

    def __init__(self, *, only_fast: bool, long: bool) -> None:
        self._only_fast = only_fast
        self._long = long
        self._unmarked: str | None = None
        """The id of the running test, if it must not start a process."""
        if only_fast:
            sys.meta_path.insert(0, _NoModels())
        sys.addaudithook(self._check_event)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Skip the tests of models in a fast run."""
        return True if self._only_fast and collection_path.name in _MODEL_TESTS else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Mark the tests that start processes, and deselect the tests that the options exclude."""
        for item in items:
            if _SYSTEMS.intersection(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.processes)
        selected = [item for item in items if self._selects(item)]
        config.hook.pytest_deselected(items=[item for item in items if not self._selects(item)])
        items[:] = selected

    def _selects(self, item: pytest.Item) -> bool:
        if item.get_closest_marker("long") and not self._long:
            return False
        return _is_fast(item) or not self._only_fast

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Watch the test for processes that it must not start."""
        self._unmarked = None if item.get_closest_marker("processes") else item.nodeid
        try:
            return (yield)
        finally:
            self._unmarked = None

    def _check_event(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and self._unmarked and not _sharing:
            raise RuntimeError(f"{self._unmarked} starts a process: mark it with pytest.mark.processes")


def _is_fast(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    needs_postgres = any(isinstance(value, str) and value.startswith("postgres") for value in parameters)
    marked = any(item.get_closest_marker(name) for name in ("slow", "processes"))
    return not (marked or needs_postgres or "postgres_admin_url" in getattr(item, "fixturenames", ()))


_sharing: list[None] = []


@contextlib.contextmanager
def shared_server() -> Iterator[None]:
    """Allow the block to start a server shared by all tests of this process."""
    _sharing.append(None)
    try:
        yield
    finally:
        _sharing.pop()


class _NoModels:
    """Import finder that refuses the packages which fast tests must not import."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Raise ImportError for a package that loads models; find nothing otherwise."""
        if name in _MODELS:
            raise ImportError(f"fast tests must not import {name}")
