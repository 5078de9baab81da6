"""What goes wrong in one run: seeded faults, one after the other, of every process and at every labelled point."""

import contextlib
import heapq
import itertools
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import redis

from tests.chaos import points
from tests.chaos.children import Child
from tests.chaos.databases import Database

SHARED = ("database", "broker", "maintenance")
"""While one of these is away, nobody can be expected to notice anything in time."""

FAULTS = (
    "worker: killed",
    "worker: terminated",
    "worker: stopped for less than its lease",
    "worker: stopped for longer than its lease",
    "api: killed",
    "api: terminated",
    "api: stopped",
    "maintenance: killed",
    "maintenance: terminated",
    "maintenance: stopped",
    "broker: killed",
    "broker: restarted",
    "broker: stopped",
    "broker: flushed",
    "broker: connections cut",
)
"""What can happen at any moment, beside what can happen to the database and at the labelled points."""

_POINT = "point: "
_UP_AGAIN_SECONDS = 3.0
_CLOCKS_OFF = (0, 0, -600, 600)
"""What a process that is started again has for a clock, in seconds off the right one."""


@dataclass
class Trouble:
    """One fault: of what kind, of whom, and from when to when it was there."""

    kind: str
    of: str
    began: float
    ended: float | None = None


@dataclass
class Kill:
    """A worker that ended without a word, and the jobs that it held, with the attempt of each."""

    at: float
    held: dict[str, int]


@dataclass
class Monkey:
    """Takes the faults from a shuffled deck that holds each of them, so that all come before one comes again."""

    children: list[Child]
    database: Database
    broker_port: int
    points: Path
    dice: random.Random
    mean_gap: float
    lease: float
    each_fault_once: bool = False
    troubles: list[Trouble] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    drains: list[float] = field(default_factory=list)
    by_themselves: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    labels: "Counter[str]" = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._deck: list[str] = []
        self._next = time.monotonic()
        self._armed: dict[str, signal.Signals] = {}
        self._active: dict[str, Trouble] = {}

    def tick(self, *, more: bool) -> None:
        """Do what is due: end troubles, start again what has ended, and, with `more`, make new trouble."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        self._look_at_points()
        for child in self.children:
            self._look_after(child)
        if more and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.dice.expovariate(1 / self.mean_gap)
            self._one_more()

    def make_peace(self) -> None:
        """End every trouble and start everything that has ended."""
        points.disarm(self.points)
        while self._due:
            heapq.heappop(self._due)[2]()
        self._look_at_points()
        for child in self.children:
            if child.stopped and child.running:
                self._go_on(child)
            child.starts_at = 0.0
            self._look_after(child)

    def _one_more(self) -> None:
        for _ in range(50):
            if not self._deck:
                self._deck = self._shuffled()
            kind = self._deck.pop()
            if kind.partition(":")[0] not in self._active:
                self._do(kind)
                return

    def _shuffled(self) -> list[str]:
        """All of them; in a long run those of workers more often."""
        chosen = [*FAULTS, *self.database.faults]
        of_points = [f"{_POINT}{label}" for labels in points.LABELS.values() for label in labels]
        deck = [*chosen, *of_points]
        if not self.each_fault_once:
            deck += [*chosen, *[kind for kind in chosen if kind.startswith("worker")] * 3]
        self.dice.shuffle(deck)
        return deck

    def _do(self, kind: str) -> None:
        of, _, what = kind.partition(": ")
        short, long = self.dice.uniform(0.1, 0.5) * self.lease, self.dice.uniform(1.3, 2.5) * self.lease
        match what:
            case "killed":
                self._signal(kind, of, signal.SIGKILL)
            case "terminated":
                self._signal(kind, of, signal.SIGTERM)
            case "restarted":
                self._signal(kind, of, signal.SIGINT)
            case "stopped for less than its lease":
                self._stop(kind, of, short)
            case "stopped for longer than its lease":
                self._stop(kind, of, long)
            case "stopped":
                self._stop(kind, of, self.dice.choice((short, long)))
            case "hangs":
                self._hang(kind, self.dice.choice((short, long)))
            case "flushed":
                self._command(kind, "FLUSHALL")
            case "connections cut" if of == "broker":
                self._command(kind, "CLIENT", "KILL", "TYPE", "normal")
            case "connections cut":
                self.troubles.append(Trouble(kind, of, time.time(), time.time()))
                self.database.cut()
            case _:
                self._arm(kind.removeprefix(_POINT))

    def _arm(self, label: str) -> None:
        self._armed[label] = self.dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
        points.arm(self.points, label, self._armed[label])

    def _look_at_points(self) -> None:
        for label, pid in points.reached(self.points):
            child = next((c for c in self.children if c.pid == pid), None)
            number = self._armed.pop(label)
            self.labels[label] += 1
            if child is None or not child.starts:
                continue
            kind = child.kind
            if number == signal.SIGKILL:
                self._begin(f"{kind}: killed at a labelled point", child)
                child.terminated = "killed"
                child.asked_at = time.time()
            else:
                self._begin(f"{kind}: stopped at a labelled point", child)
                child.stopped = True
                child.asked_at = math.inf  # how long it takes to end says nothing now
                self._later(self.dice.uniform(0.3, 2.5) * self.lease, partial(self._go_on, child, pid))

    def _one_of(self, kind: str) -> Child | None:
        up = [c for c in self.children if c.kind == kind and c.running and not c.stopped and not c.terminated]
        up = [c for c in up if not c.spared]
        return self.dice.choice(up) if up else None

    def _signal(self, fault: str, kind: str, number: signal.Signals) -> None:
        if child := self._one_of(kind):
            self._begin(fault, child)
            child.terminated = "killed" if number == signal.SIGKILL else "asked"
            child.asked_at = time.time()
            child.signal(number)

    def _stop(self, fault: str, kind: str, seconds: float) -> None:
        if child := self._one_of(kind):
            self._begin(fault, child)
            child.signal(signal.SIGSTOP)
            self._later(seconds, partial(self._go_on, child, child.pid))

    def _go_on(self, child: Child, pid: int | None = None) -> None:
        if child.running and (pid is None or child.pid == pid):
            child.signal(signal.SIGCONT)
            child.stopped = False
            self._end(child.name)

    def _hang(self, fault: str, seconds: float) -> None:
        trouble = self._active["database"] = Trouble(fault, "database", time.time())
        self.troubles.append(trouble)
        self.database.hold()
        self._later(seconds, self._let_go)

    def _let_go(self) -> None:
        self.database.let_go()
        self._end("database")

    def _command(self, kind: str, *words: str) -> None:
        now = time.time()
        with contextlib.suppress(redis.RedisError), redis.Redis(port=self.broker_port, socket_timeout=1) as client:
            client.execute_command(*words)
            self.troubles.append(Trouble(kind, "broker", now, time.time()))

    def _look_after(self, child: Child) -> None:
        """Note how a child has ended, and start it again when that is due."""
        if child.popen is None:
            if time.monotonic() >= child.starts_at:
                self._start(child)
            return
        if child.popen.poll() is None:
            if child.terminated == "asked" and time.time() - child.asked_at > 60:
                self.wrong.append(f"{child.name} did not end within 60 s\n{child.say_last()}")
                child.signal(signal.SIGKILL)
            return
        code, now = child.popen.returncode, time.time()
        self._look_at_points()  # where it may just have died
        if child.kind in ("worker", "maintenance", "api"):
            child.remember_alarms()
        if child.terminated == "asked" and child.kind == "worker" and code != -signal.SIGKILL:
            ready = "is ready" in child.said()  # before that there is nothing to drain, and at first no handler
            if ready and child.asked_at <= now:
                self.drains.append(now - child.asked_at)
            if ready and code != 0:
                self.wrong.append(f"{child.name} was terminated and ended with {code}\n{child.say_last()}")
        elif child.kind == "worker" and child.terminated:
            self.kills.append(Kill(child.asked_at, child.holds()))
        elif not child.terminated and child.kind != "database":
            self.by_themselves.append(f"{child.name} ended by itself with {code}\n{child.say_last(40)}")
        child.popen = None
        child.stopped = False
        child.starts_at = time.monotonic() + self.dice.uniform(0, 1.5)

    def _start(self, child: Child) -> None:
        own = {}
        if child.kind == "worker":
            own["TPO_SCRIPTED_LATENCY"] = f"{self.dice.uniform(0.05, 0.4):.2f}"
        if not child.spared:
            own["CHAOS_CLOCK_OFF"] = str(self.dice.choice(_CLOCKS_OFF))
        child.start(**own)
        # It is there again once it has come up.
        if child.name in self._active:
            trouble = self._active[child.name]
            self._later(_UP_AGAIN_SECONDS, partial(self._end, trouble.of, trouble))

    def _begin(self, kind: str, child: Child) -> None:
        self._end(child.name)
        trouble = Trouble(kind, child.name, time.time())
        self.troubles.append(trouble)
        self._active[child.name] = trouble

    def _end(self, name: str, only: Trouble | None = None) -> None:
        trouble = self._active.get(name)
        if trouble and only in (None, trouble):
            trouble.ended = time.time()
            del self._active[name]

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), do))

    def quiet(self, began: float, ended: float, *, of: tuple[str, ...] | None = SHARED) -> bool:
        """Whether no trouble of these was there in that time; of anything at all with None."""
        near = [t for t in self.troubles if t.began < ended and (t.ended or ended) >= began]
        return not any(of is None or t.of in of or self._holds_all(t) for t in near)

    def _holds_all(self, trouble: Trouble) -> bool:
        """SQLite has one writer: whoever is stopped in the middle of a transaction stops everybody."""
        return self.database.child is None and "stopped" in trouble.kind
