"""Read docker-compose.yml, and run the command of a service natively with only the environment of that service."""

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
    """A variable that the Compose file requires is not set."""


def read(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the Compose file with anchors merged and variables substituted.

    Raises Unset if a required variable has no value.
    """
    return dict(_interpolated(yaml.safe_load((ROOT / "docker-compose.yml").read_text()), variables))


def _interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [_interpolated(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match[str]) -> str:
        name, operator, word = match.groups()
        if name is None:
            return "$"
        if given := variables.get(name):
            return given
        if operator == ":?":
            raise Unset(word)
        return word if operator == ":-" else ""

    return _VARIABLE.sub(substitute, value)


@dataclass(frozen=True)
class Native:
    """The services of the Compose file as processes of this machine.

    `rewrites` maps addresses and paths of the containers to those of this machine. `programs` comes first on PATH.
    """

    services: Mapping[str, Any]
    rewrites: Mapping[str, str]
    programs: Path
    folder: Path

    def command(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Return the command and the environment of a service."""
        service = self.services[name]
        return [self._rewrite(word) for word in service["command"]], self.environment(name)

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a service, with PATH."""
        values = {key: self._rewrite(value) for key, value in self.services[name]["environment"].items()}
        return {"PATH": f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", **values}

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        """Start a service as `docker compose up` does. Its output goes to a log file."""
        command, environment = self.command(name)
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)

    def is_healthy(self, name: str) -> bool:
        """Run the health check of the service and return whether it passed."""
        kind, *words = (self._rewrite(word) for word in self.services[name]["healthcheck"]["test"])
        command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        seconds = float(self.services[name]["healthcheck"]["timeout"].removesuffix("s"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=self.environment(name), capture_output=True, timeout=4 * seconds)
            return done.returncode == 0
        return False

    def log(self, name: str) -> str:
        """Return the output of a service so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _rewrite(self, word: str) -> str:
        for container, local in self.rewrites.items():
            word = word.replace(container, local)
        return word


@contextlib.contextmanager
def ended(processes: Mapping[str, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Kill the processes that still run at the end of the block, in reverse order."""
    try:
        yield
    finally:
        for process in reversed(list(processes.values())):
            if process.poll() is None:
                process.kill()
                process.wait()
