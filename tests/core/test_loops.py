"""Maintenance loops: none delays another, none depends on the wall clock, and a long step is noticed."""

import ast
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from testing.waiting import HANG_SECONDS
from worker.drain import Drain
from worker.loops import Loop, LoopWatch

HOUR = 3600.0
ROOT = Path(__file__).parents[2]
WALL_CLOCK = {"time.time", "datetime.now", "datetime.utcnow", "date.today"}
WALL_CLOCK_IS_MEANT = {"tpo/backends/remote/server.py": "the date in a Retry-After header"}


class Rounds:
    """A task that counts its rounds, and can be waited for."""

    def __init__(self, result: Callable[[int], bool] = lambda _number: False) -> None:
        self.count = 0
        self._result = result
        self._changed = threading.Condition()

    def __call__(self) -> bool:
        """Run one round."""
        with self._changed:
            self.count += 1
            self._changed.notify_all()
        return self._result(self.count)

    def wait_for(self, count: int) -> None:
        """Wait until this many rounds have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, HANG_SECONDS)


@pytest.fixture
def start() -> Iterator[Callable[..., Loop]]:
    """Return a function that starts a loop, which ends with the test."""
    loops: list[Loop] = []

    def started(seconds: float, task: Callable[[], bool]) -> Loop:
        loops.append(loop := Loop(f"loop {len(loops)}", seconds, task))
        loop.start()
        return loop

    yield started
    for loop in loops:
        loop.stop()


def test_slow_loop_delays_no_other(start: Callable[..., Loop]) -> None:
    release, entered, rounds = threading.Event(), threading.Event(), Rounds()

    def slow() -> bool:
        entered.set()
        return release.wait(HANG_SECONDS) and False

    start(0.001, slow)
    assert entered.wait(HANG_SECONDS)
    start(0.001, rounds)
    rounds.wait_for(5)
    assert not release.is_set()
    release.set()


def test_loop_repeats_after_a_failure(start: Callable[..., Loop], caplog: pytest.LogCaptureFixture) -> None:
    text = "a text of a user"

    def fail(_number: int) -> bool:
        raise RuntimeError(text)

    rounds = Rounds(fail)
    start(0.001, rounds)
    rounds.wait_for(3)
    assert "loop 0 has failed" in caplog.text
    assert text not in caplog.text


def test_loop_continues_at_once_while_there_is_more(start: Callable[..., Loop]) -> None:
    rounds = Rounds(lambda number: number < 4)
    start(HOUR, rounds)
    rounds.wait_for(4)


def test_wake_ends_the_pause(start: Callable[..., Loop]) -> None:
    rounds = Rounds()
    loop = start(HOUR, rounds)
    for number in (1, 2, 3):
        rounds.wait_for(number)
        loop.wake()


def test_clock_set_back_stops_no_loop(start: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds()
    start(0.001, rounds)
    rounds.wait_for(2)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 40 * 24 * HOUR)
    rounds.wait_for(rounds.count + 3)


def test_watch_reports_a_long_step_until_it_is_stuck(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, drain = Loop("batches", 1, lambda: False), Drain()
    watch = LoopWatch([loop], drain, stuck_seconds=300)
    reported = []
    for seconds in (0, 9, 10, 15, 21, 0, 11, 299, 300):
        caplog.clear()
        monkeypatch.setattr(loop, "step_seconds", partial(float, seconds))
        watch.check()
        reported += [seconds] if "batches: a step has been running" in caplog.text else []
    assert reported == [10, 21, 11, 299]
    assert drain.exit_code == 1
    assert "batches: a step is stuck" in caplog.text


def test_intervals_use_no_wall_clock() -> None:
    found = {}
    for folder in ("tpo", "api", "worker"):
        for file in (ROOT / folder).rglob("*.py"):
            calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
            if used := {name for name in calls if name.endswith(tuple(WALL_CLOCK))}:
                found[str(file.relative_to(ROOT))] = used
    assert found.keys() == WALL_CLOCK_IS_MEANT.keys(), found


def test_no_message_has_an_expiry_or_a_start_time() -> None:
    for folder in ("tpo", "api", "worker"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("send_task", "apply_async")):
                    assert not {k.arg for k in node.keywords} & {"expires", "eta", "countdown"}, file
