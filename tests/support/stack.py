"""A real `tpo up` for tests, with its own folder, free ports and the scripted back end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from testing.forking import run_python
from testing.ports import free_port
from testing.waiting import HANG_SECONDS, eventually

TPO = (sys.executable, "-m", "tpo")


def environment(**more: str) -> dict[str, str]:
    """Return this environment with the scripted back end and free ports, without inherited settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TPO_", "FLOWER_"))}
    settings = {
        "TPO_POLICY": "scripted",
        "TPO_REWARD_MODEL": "scripted",
        "TPO_URL": "http://127.0.0.1:1",
        "TPO_PORT": str(free_port()),
        "TPO_FLOWER_PORT": str(free_port()),
    }
    return {**inherited, **settings, **more}


def tpo_up(data_dir: Path, *words: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a `tpo up` that ends by itself, with a broker on a free port, and return its result."""
    return tpo("up", "--data-dir", str(data_dir), "--broker-port", str(free_port()), *words, env=env)


def tpo(*words: str, stdin: str = "", env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end and return its result."""
    return run_python("-m", "tpo", *words, env=env or environment(), stdin=stdin)


class Up:
    """A running `tpo up` whose output is read as JSON lines."""

    def __init__(self, data_dir: Path, ports: Mapping[str, int], env: Mapping[str, str], *words: str) -> None:
        options = [word for name, port in ports.items() for word in (f"--{name}", str(port))]
        self.process = subprocess.Popen(
            [*TPO, "up", "--json", "--data-dir", str(data_dir), *options, *words],
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ports = ports
        self.pids: dict[str, int] = {}
        self.facts: dict[str, Any] = {}
        self.env = {**env, "TPO_URL": f"http://127.0.0.1:{ports['port']}"}

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of its output until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            fact = json.loads(line)
            if fact["event"] == "started":
                self.pids[fact["service"]] = fact["pid"]
            yield fact

    def wait_for(self, event: str) -> dict[str, Any]:
        """Return the next event of that name. Raises AssertionError if the process ends first."""
        for fact in self.events():
            if fact["event"] == event:
                return fact
        raise AssertionError(f"ended without {event}: {self.errors()}")

    def errors(self) -> str:
        """Return its stderr, after it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def stop(self, number: int = signal.SIGINT) -> tuple[int, list[dict[str, Any]]]:
        """Send a signal and return the exit code and the remaining events."""
        self.process.send_signal(number)
        rest = list(self.events())
        return self.process.wait(HANG_SECONDS), rest

    def family(self) -> list[psutil.Process]:
        """Return the process and all its descendants."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


@contextlib.contextmanager
def running_up(data_dir: Path, *words: str, **more: str) -> Iterator[Up]:
    """Yield a `tpo up` that is ready. It is terminated at the end unless the test stopped it."""
    ports = {"port": free_port(), "flower-port": free_port(), "broker-port": free_port()}
    up = Up(data_dir, ports, environment(**more), *words)
    with up.process:
        try:
            up.facts = up.wait_for("ready")
            yield up
        finally:
            if up.process.poll() is None:
                up.process.terminate()
                for _ in up.events():
                    pass


def all_gone(processes: list[psutil.Process]) -> bool:
    """Wait until all processes have ended, and return whether they have."""
    return eventually(lambda: not any(map(_is_alive, processes)), why="all processes have ended")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
