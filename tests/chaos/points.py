"""Labelled points of a step. The first process that reaches an armed point is killed or stopped there.

A file with the name of the point arms it. The process that moves the file away owns it, so one arming is one fault.
The process reads the file before it reports the point as reached, so the report may be deleted immediately.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.core.ports import Generate, Generation, Interrupt, Rewards, Score
from tpo.db import DEFAULT_TENANT
from tpo.store import Store

WRITES = {
    "worker": ("leases", ("claim", "checkpoint", "finish", "release", "renew")),
    "maintenance": ("maintenance", ("sweep",)),
    "api": ("jobs", ("submit", "cancel", "pause", "resume")),
}
"""Writes of each kind of process, as a part of the store and its methods.

Each write has a point before it, before its COMMIT, and after it.
"""

CALLS = ("generate", "score")
"""Model calls. Each has a point before it, within it, and after it."""

LABELS = {
    kind: tuple(f"{kind}.{write}.{where}" for write in writes for where in ("before", "commit", "after"))
    for kind, (_, writes) in WRITES.items()
}
LABELS["worker"] += tuple(f"worker.{call}.{where}" for call in CALLS for where in ("before", "during", "after"))

_REACHED = "reached"


def arm(folder: Path, label: str, number: signal.Signals) -> None:
    """Arm a point: the first process that reaches it gets this signal."""
    (folder / _REACHED).mkdir(parents=True, exist_ok=True)
    temporary = folder / "armed"
    temporary.write_text(number.name)
    temporary.rename(folder / label)


def disarm(folder: Path) -> None:
    """Disarm the points that no process has reached."""
    for labels in LABELS.values():
        for label in labels:
            (folder / label).unlink(missing_ok=True)


def reached(folder: Path) -> list[tuple[str, int]]:
    """Return the labels reached since the last call, each with the id of the process that was hit."""
    found = []
    for file in sorted((folder / _REACHED).glob("*")):
        label, _, pid = file.name.rpartition(".")
        found.append((label, int(pid)))
        file.unlink()
    return found


class Points:
    """Points of one process."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._current = threading.local()

    def here(self, label: str) -> None:
        """Kill or stop this process if the point is armed."""
        name = f"{self._kind}.{label}"
        mine = self._folder / f"taken.{os.getpid()}.{threading.get_ident()}"
        try:
            os.rename(self._folder / name, mine)
        except FileNotFoundError:
            return
        number = signal.Signals[mine.read_text()]
        mine.rename(self._folder / _REACHED / f"{name}.{os.getpid()}")
        os.kill(os.getpid(), number)

    def on(self, engine: Engine) -> Store:
        """Return a store with a point before, inside and after each of its writes."""
        event.listen(engine, "commit", lambda _connection: self._before_commit())
        return self._store_class()(engine)

    def _store_class(self) -> type[Store]:
        part, writes = WRITES[self._kind]
        points = self

        class StoreWithPoints(Store):
            def __init__(self, engine: Engine, tenant: str = DEFAULT_TENANT) -> None:
                super().__init__(engine, tenant)
                queries = getattr(self, part)
                for name in writes:
                    setattr(queries, name, points._around(name, getattr(queries, name)))

        return StoreWithPoints

    def _before_commit(self) -> None:
        if write := getattr(self._current, "write", None):
            self.here(f"{write}.commit")

    def _around(self, name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def with_points(*args: Any, **kwargs: Any) -> Any:
            self.here(f"{name}.before")
            self._current.write = name
            try:
                result = write(*args, **kwargs)
            finally:
                self._current.write = None
            self.here(f"{name}.after")
            return result

        return with_points


class PolicyWithPoints(ScriptedPolicy):
    """Scripted policy with points before, within and after each call."""

    points: Points

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        self.points.here("generate.before")
        generation = super().generate(request, _during(self.points, "generate", interrupt))
        self.points.here("generate.after")
        return generation


class RewardModelWithPoints(ScriptedRewardModel):
    """Scripted reward model with points before, within and after each call."""

    points: Points

    def score(self, request: Score, interrupt: Interrupt) -> Rewards:
        self.points.here("score.before")
        rewards = super().score(request, _during(self.points, "score", interrupt))
        self.points.here("score.after")
        return rewards


def _during(points: Points, call: str, interrupt: Interrupt) -> Interrupt:
    def with_point() -> None:
        points.here(f"{call}.during")
        interrupt()

    return with_point
