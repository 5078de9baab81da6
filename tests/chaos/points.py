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

from sqlalchemy import event

from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.jobs.store import Store
from tpo.ports import Generate, Generation, Interrupt, Rewards, Score

WRITES = {
    "worker": ("claim_next", "checkpoint", "finish", "release", "renew"),
    "maintenance": ("sweep",),
    "api": ("submit", "cancel", "pause", "resume"),
}
"""What each kind of process writes; a point lies before each, before its COMMIT, and after it."""

CALLS = ("generate", "score")
"""Model calls; a point lies before each, in the middle of it, and after it."""

LABELS = {
    kind: tuple(f"{kind}.{write}.{where}" for write in writes for where in ("before", "commit", "after"))
    for kind, writes in WRITES.items()
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

    def on(self, store: Store) -> Store:
        """The same store with a point before, inside and after each of its writes."""
        engine = store._engine
        event.listen(engine, "commit", lambda _connection: self._before_commit())
        return self.store_class()(engine)

    def store_class(self) -> type[Store]:
        """A class of store with these points."""
        return type("StoreWithPoints", (Store,), {name: self._around(name) for name in WRITES[self._kind]})

    def before_commits_of(self, engine: Any) -> None:
        """Put a point before each COMMIT of an engine."""
        event.listen(engine, "commit", lambda _connection: self._before_commit())

    def _before_commit(self) -> None:
        if doing := getattr(self._now, "doing", None):
            self.here(f"{doing}.commit")

    def _around(self, name: str) -> Callable[..., Any]:
        write = getattr(Store, name)

        def with_points(store: Store, *args: Any, **kwargs: Any) -> Any:
            self.here(f"{name}.before")
            self._now.doing = name
            try:
                answer = write(store, *args, **kwargs)
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
