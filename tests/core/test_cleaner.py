"""The cleaner: what one round purges, and after which time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tpo.core.errors import StoreUnavailableError
from tpo.settings import Settings
from worker.tasks.cleaner import Cleaner

DAY = 24 * 3600.0


class RecordingStore:
    """A store with a number of full batches of each kind to purge, which records the calls."""

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self.calls: list[tuple[str, float | None]] = []

    def __getattr__(self, part: str) -> "_Part":
        return _Part(part, self._purge)

    def _purge(self, name: str, seconds: float | None) -> int:
        self.calls.append((name, seconds))
        return 5 if self.calls.count((name, seconds)) <= self._batches else 0


class _Part:
    """A part of the store, each of whose methods is a purge."""

    def __init__(self, name: str, purge: Callable[[str, float | None], int]) -> None:
        self._name = name
        self._purge = purge

    def __getattr__(self, method: str) -> Callable[[float | None], int]:
        return partial(self._purge, f"{self._name}.{method}")


def purges(batches: int = 0, **settings: Any) -> list[tuple[str, float | None]]:
    """Run one round and return the purges with their retention in seconds."""
    store: Any = RecordingStore(batches)
    Cleaner(Settings(**settings), store).purge()
    return sorted(store.calls)


def test_cleaner_uses_retention_of_each_kind() -> None:
    always = [
        ("deliveries.purge", 7 * DAY),
        ("idempotency_keys.purge", 3 * 3600.0),
        ("maintenance.purge_last_claims", DAY),
    ]
    assert purges(idempotency_hours=3) == sorted([*always, ("files.purge", None)])
    kept = [(name, 2 * DAY) for name in ("maintenance.purge", "batches.purge", "files.purge")]
    assert purges(idempotency_hours=3, retention_days=2) == sorted([*always, *kept])


def test_cleaner_repeats_until_nothing_is_left() -> None:
    assert purges(2, retention_days=2) == sorted(3 * purges(retention_days=2))


@pytest.mark.parametrize("error", [StoreUnavailableError(), ValueError("a text of a user")])
def test_cleaner_logs_failure_without_raising(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(RecordingStore):
        def _purge(self, name: str, seconds: float | None) -> int:
            raise error

    store: Any = Failing(0)
    Cleaner(Settings(retention_days=2), store).purge()
    assert "nothing purged" in caplog.text
    assert "a text of a user" not in caplog.text
