"""Which tests are run: by default all but the longest, with `--long` these too, with `--fast` only the fast ones.

Fast tests need no model, start no process of their own, and run on SQLite. What a test needs is read from its fixtures
and markers, and held in every run: a test that starts a process without being marked for it fails.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SYSTEMS = {"system", "sqlite_system", "shared_system", "module_api", "served"}
"""Fixtures that start processes for one test or one module."""

_MODELS = ("torch", "transformers")
_OF_MODELS = {"engine", "remote", "test_backends.py", "test_demo_grammar.py"}
"""Folders and files of tests that import them."""


def add_option(parser: pytest.Parser) -> None:
    """Add the options that select tests."""
    parser.addoption("--fast", action="store_true", help="run only tests that need no model and start no process")
    parser.addoption("--long", action="store_true", help="run also the tests that take minutes")


class Selection:
    """The plugin that marks, selects and watches tests, in every test process."""

    def __init__(self, *, only_fast: bool, long: bool) -> None:
        self._only_fast = only_fast
        self._long = long
        self._unmarked: str | None = None
        """The test that runs now, if it may start no process."""
        if only_fast:
            sys.meta_path.insert(0, _NoModels())
        sys.addaudithook(self._look)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out the tests of models."""
        return True if self._only_fast and collection_path.name in _OF_MODELS else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Mark the tests that start processes, and deselect what is not fast."""
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
        """Watch a test."""
        self._unmarked = None if item.get_closest_marker("processes") else item.nodeid
        try:
            return (yield)
        finally:
            self._unmarked = None

    def _look(self, event: str, _arguments: tuple[Any, ...]) -> None:
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
    """Allow the block to start a server that all tests of this process share."""
    _sharing.append(None)
    try:
        yield
    finally:
        _sharing.pop()


class _NoModels:
    """Refuses to import what the fast tests must do without."""

    def find_spec(self, name: str, *_: Any) -> None:
        """Raise ImportError for a package that loads models."""
        if name in _MODELS:
            raise ImportError(f"the fast tests import no {name}")
