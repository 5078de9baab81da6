"""Faults of a run: seeded, one after the other, of every process and at every labelled point."""

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
"""Parts that must be up for a dead worker to be noticed in time."""

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
"""Faults at random moments. The database adds its own, and the labelled points are faults too."""

_POINT = "point: "
_UP_AGAIN_SECONDS = 3.0
_CLOCKS_OFF = (0, 0, -600, 600)
"""Clock offsets of restarted processes, in seconds."""


@dataclass
class Fault:
    """A fault: its kind, the affected part, and when it began and ended."""

    kind: str
    of: str
    began: float
    ended: float | None = None


@dataclass
class Kill:
    """A killed worker: the time, and the jobs that it held, each with its attempt."""

    at: float
    held: dict[str, int]


@dataclass
class Monkey:
    """Draws faults from a shuffled deck of all of them, so that each occurs before one is repeated."""

    children: list[Child]
    database: Database
    broker_port: int
    points: Path
    rng: random.Random
    mean_gap: float
    lease: float
    each_fault_once: bool = False
    faults: list[Fault] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    drains: list[float] = field(default_factory=list)
    self_ended: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    labels: "Counter[str]" = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._deck: list[str] = []
        self._next = time.monotonic()
        self._armed: dict[str, signal.Signals] = {}
        self._active: dict[str, Fault] = {}

    def tick(self, *, more: bool) -> None:
        """Do what is due: end faults, restart processes that have ended and, with `more`, cause a new fault."""
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()
        self._check_points()
        for child in self.children:
            self._check_child(child)
        if more and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.rng.expovariate(1 / self.mean_gap)
            self._cause_fault()

    def end_faults(self) -> None:
        """End every fault and start every process that has ended."""
        points.disarm(self.points)
        while self._due:
            heapq.heappop(self._due)[2]()
        self._check_points()
        for child in self.children:
            if child.stopped and child.running:
                self._continue(child)
            child.starts_at = 0.0
            self._check_child(child)

    def _cause_fault(self) -> None:
        for _ in range(50):
            if not self._deck:
                self._deck = self._shuffled()
            kind = self._deck.pop()
            if kind.partition(":")[0] not in self._active:
                self._do(kind)
                return

    def _shuffled(self) -> list[str]:
        """Return all faults in random order. In a long run, faults of workers occur more often."""
        chosen = [*FAULTS, *self.database.faults]
        of_points = [f"{_POINT}{label}" for labels in points.LABELS.values() for label in labels]
        deck = [*chosen, *of_points]
        if not self.each_fault_once:
            deck += [*chosen, *[kind for kind in chosen if kind.startswith("worker")] * 3]
        self.rng.shuffle(deck)
        return deck

    def _do(self, kind: str) -> None:
        of, _, what = kind.partition(": ")
        short, long = self.rng.uniform(0.1, 0.5) * self.lease, self.rng.uniform(1.3, 2.5) * self.lease
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
                self._stop(kind, of, self.rng.choice((short, long)))
            case "hangs":
                self._hang(kind, self.rng.choice((short, long)))
            case "flushed":
                self._command(kind, "FLUSHALL")
            case "connections cut" if of == "broker":
                self._command(kind, "CLIENT", "KILL", "TYPE", "normal")
            case "connections cut":
                self.faults.append(Fault(kind, of, time.time(), time.time()))
                self.database.cut()
            case _:
                self._arm(kind.removeprefix(_POINT))

    def _arm(self, label: str) -> None:
        self._armed[label] = self.rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
        points.arm(self.points, label, self._armed[label])

    def _check_points(self) -> None:
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
                child.asked_at = math.inf  # the time to its end must not be measured
                self._later(self.rng.uniform(0.3, 2.5) * self.lease, partial(self._continue, child, pid))

    def _pick_child(self, kind: str) -> Child | None:
        up = [c for c in self.children if c.kind == kind and c.running and not c.stopped and not c.terminated]
        up = [c for c in up if not c.spared]
        return self.rng.choice(up) if up else None

    def _signal(self, fault: str, kind: str, number: signal.Signals) -> None:
        if child := self._pick_child(kind):
            self._begin(fault, child)
            child.terminated = "killed" if number == signal.SIGKILL else "asked"
            child.asked_at = time.time()
            child.signal(number)

    def _stop(self, fault: str, kind: str, seconds: float) -> None:
        if child := self._pick_child(kind):
            self._begin(fault, child)
            child.signal(signal.SIGSTOP)
            self._later(seconds, partial(self._continue, child, child.pid))

    def _continue(self, child: Child, pid: int | None = None) -> None:
        if child.running and (pid is None or child.pid == pid):
            child.signal(signal.SIGCONT)
            child.stopped = False
            self._end(child.name)

    def _hang(self, kind: str, seconds: float) -> None:
        fault = self._active["database"] = Fault(kind, "database", time.time())
        self.faults.append(fault)
        self.database.hold()
        self._later(seconds, self._resume_database)

    def _resume_database(self) -> None:
        self.database.resume()
        self._end("database")

    def _command(self, kind: str, *words: str) -> None:
        now = time.time()
        with contextlib.suppress(redis.RedisError), redis.Redis(port=self.broker_port, socket_timeout=1) as client:
            client.execute_command(*words)
            self.faults.append(Fault(kind, "broker", now, time.time()))

    def _check_child(self, child: Child) -> None:
        """Record how a child has ended, and restart it when that is due."""
        if child.popen is None:
            if time.monotonic() >= child.starts_at:
                self._start(child)
            return
        if child.popen.poll() is None:
            if child.terminated == "asked" and time.time() - child.asked_at > 60:
                self.wrong.append(f"{child.name} did not end within 60 s\n{child.log_tail()}")
                child.signal(signal.SIGKILL)
            return
        code, now = child.popen.returncode, time.time()
        self._check_points()  # it may have been killed at a point
        if child.kind in ("worker", "maintenance", "api"):
            child.remember_alarms()
        if child.terminated == "asked" and child.kind == "worker" and code != -signal.SIGKILL:
            ready = "is ready" in child.output()  # before, there is nothing to drain and perhaps no signal handler
            if ready and child.asked_at <= now:
                self.drains.append(now - child.asked_at)
            if ready and code != 0:
                self.wrong.append(f"{child.name} was terminated and ended with {code}\n{child.log_tail()}")
        elif child.kind == "worker" and child.terminated:
            self.kills.append(Kill(child.asked_at, child.held_jobs()))
        elif not child.terminated and child.kind != "database":
            self.self_ended.append(f"{child.name} ended by itself with {code}\n{child.log_tail(40)}")
        child.popen = None
        child.stopped = False
        child.starts_at = time.monotonic() + self.rng.uniform(0, 1.5)

    def _start(self, child: Child) -> None:
        own = {}
        if child.kind == "worker":
            own["TPO_SCRIPTED_LATENCY"] = f"{self.rng.uniform(0.05, 0.4):.2f}"
        if not child.spared:
            own["CHAOS_CLOCK_OFF"] = str(self.rng.choice(_CLOCKS_OFF))
        child.start(**own)
        # The fault ends when the process has started up.
        if child.name in self._active:
            fault = self._active[child.name]
            self._later(_UP_AGAIN_SECONDS, partial(self._end, fault.of, fault))

    def _begin(self, kind: str, child: Child) -> None:
        self._end(child.name)
        fault = Fault(kind, child.name, time.time())
        self.faults.append(fault)
        self._active[child.name] = fault

    def _end(self, name: str, only: Fault | None = None) -> None:
        fault = self._active.get(name)
        if fault and only in (None, fault):
            fault.ended = time.time()
            del self._active[name]

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), do))

    def quiet(self, began: float, ended: float, *, of: tuple[str, ...] | None = SHARED) -> bool:
        """Return whether no fault of these parts overlaps this time. `of=None` means any part."""
        near = [f for f in self.faults if f.began < ended and (f.ended or ended) >= began]
        return not any(of is None or f.of in of or self._blocks_all(f) for f in near)

    def _blocks_all(self, fault: Fault) -> bool:
        """Return whether the fault blocks all writers: on SQLite, a process stopped within a transaction does."""
        return self.database.child is None and "stopped" in fault.kind
