"""Labelled points of a step: armed from outside, the first process that reaches one is killed or stopped there.

A point is armed by a file of its name. Whoever moves that file away owns it, so that one arming is one fault; only what
has been read is reported as reached, so that whoever asks may delete the report at once.
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
"""What each kind of process writes, as a part of the store and its methods.

A point lies before each write, before its COMMIT, and after it.
"""

CALLS = ("generate", "score")
"""Model calls; a point lies before each, in the middle of it, and after it."""

LABELS = {
    kind: tuple(f"{kind}.{write}.{where}" for write in writes for where in ("before", "commit", "after"))
    for kind, (_, writes) in WRITES.items()
}
LABELS["worker"] += tuple(f"worker.{call}.{where}" for call in CALLS for where in ("before", "during", "after"))

_REACHED = "reached"


def arm(folder: Path, label: str, number: signal.Signals) -> None:
    """Let the first process that reaches this point get that signal there."""
    (folder / _REACHED).mkdir(parents=True, exist_ok=True)
    being_written = folder / "armed"
    being_written.write_text(number.name)
    being_written.rename(folder / label)


def disarm(folder: Path) -> None:
    """Take back what nobody has reached."""
    for labels in LABELS.values():
        for label in labels:
            (folder / label).unlink(missing_ok=True)


def reached(folder: Path) -> list[tuple[str, int]]:
    """The labels that were reached since the last question, and the process that each has hit."""
    found = []
    for file in sorted((folder / _REACHED).glob("*")):
        label, _, pid = file.name.rpartition(".")
        found.append((label, int(pid)))
        file.unlink()
    return found


class Points:
    """The points of one process."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._kind = kind
        self._now = threading.local()

    def here(self, label: str) -> None:
        """Die or stop where this point is armed."""
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
        if doing := getattr(self._now, "doing", None):
            self.here(f"{doing}.commit")

    def _around(self, name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def with_points(*args: Any, **kwargs: Any) -> Any:
            self.here(f"{name}.before")
            self._now.doing = name
            try:
                answer = write(*args, **kwargs)
            finally:
                self._now.doing = None
            self.here(f"{name}.after")
            return answer

        return with_points


class PolicyWithPoints(ScriptedPolicy):
    """The scripted policy, with points around each call and in the middle of it."""

    points: Points

    def generate(self, request: Generate, interrupt: Interrupt) -> Generation:
        self.points.here("generate.before")
        generation = super().generate(request, _during(self.points, "generate", interrupt))
        self.points.here("generate.after")
        return generation


class RewardModelWithPoints(ScriptedRewardModel):
    """The scripted reward model, with points around each call and in the middle of it."""

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
