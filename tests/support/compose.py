"""Reads docker-compose.yml and runs a service's own command natively, with its own environment and nothing else."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?:(:[-?])([^}]*))?\}")


class Unset(Exception):
    """A variable that the file wants set is not."""


def read(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file as compose understands it: anchors merged, variables put in. Raises Unset."""
    return dict(_interpolated(yaml.safe_load((ROOT / "docker-compose.yml").read_text()), variables))


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [_interpolated(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def put_in(match: re.Match[str]) -> str:
        name, operator, word = match.groups()
        if name is None:
            return "$"
        if given := variables.get(name):
            return given
        if operator == ":?":
            raise Unset(word)
        return word if operator == ":-" else ""

    return _VARIABLE.sub(put_in, value)


@dataclass(frozen=True)
class Native:
    """This machine in the place of the containers: addresses rewritten, programs found on a path of our own."""

    services: Mapping[str, Any]
    rewrites: Mapping[str, str]
    programs: Path
    folder: Path

    def command(self, name: str) -> tuple[list[str], dict[str, str]]:
        """A service's command and environment."""
        service = self.services[name]
        return [self._here(word) for word in service["command"]], self.environment(name)

    def environment(self, name: str) -> dict[str, str]:
        """What the service is told, and a path."""
        told = {key: self._here(value) for key, value in self.services[name]["environment"].items()}
        return {"PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", **told}

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        """Start a service as `docker compose up` would."""
        command, environment = self.command(name)
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)

    def is_healthy(self, name: str) -> bool:
        """What the service's own health check says."""
        kind, *words = (self._here(word) for word in self.services[name]["healthcheck"]["test"])
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        seconds = float(self.services[name]["healthcheck"]["timeout"].removesuffix("s"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=self.environment(name), capture_output=True, timeout=4 * seconds)
            return done.returncode == 0
        return False

    def log(self, name: str) -> str:
        """What the service wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _here(self, word: str) -> str:
        for container, here in self.rewrites.items():
            word = word.replace(container, here)
        return word


@contextlib.contextmanager
def ended(processes: Mapping[str, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Leaves no process behind."""
    try:
        yield
    finally:
        for process in reversed(list(processes.values())):
            if process.poll() is None:
                process.kill()
                process.wait()
