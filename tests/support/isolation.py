"""Keep a test run apart from the rest of the machine: its environment, home, working folder, ports and servers."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testing.ports import own_ports

_KEPT = (
    # What any program needs to run.
    "PATH", "USER", "LOGNAME", "SHELL", "TERM", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CI",
    # Python, pytest and coverage.
    "PYTHONPATH", "PYTHONHASHSEED", "PYTEST_*", "COV_*", "COVERAGE_*",
    # How numerical libraries use this machine's processor.
    "CUDA_VISIBLE_DEVICES", "OPENBLAS_*", "MKL_*", "NVPL_*", "OMP_NUM_THREADS",
    # What the tests themselves are asked to do.
    "FUZZ_EXAMPLES", "FUZZ_SECONDS", "TPO_TRAJECTORIES", "VLLM_PYTHON",
)  # fmt: skip
"""Variables that tests may see; `*` stands for any ending. All others would make a run depend on somebody's shell."""

FIXED = {
    "LC_ALL": "C.UTF-8",
    "HF_HUB_OFFLINE": "1",
    # Nobody listens on port 1. A test that needs a broker starts one and says so.
    "TPO_BROKER_URL": "redis://127.0.0.1:1/0",
}
"""Variables that are the same in every run."""


def isolated_environment(inherited: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of a test run, given the one that it was started in."""
    return {name: value for name, value in inherited.items() if is_kept(name)} | FIXED | {"HOME": str(home)}


def is_kept(name: str) -> bool:
    """Whether tests may see a variable as it was."""
    return any(name.startswith(kept[:-1]) if kept.endswith("*") else name == kept for kept in _KEPT)


def enter_own_home() -> Path:
    """Take the isolated environment, with an empty home folder, and return that folder."""
    home = Path(tempfile.mkdtemp(prefix="tpo-tests-"))
    isolated = isolated_environment(os.environ, home)
    os.environ.clear()
    os.environ.update(isolated)
    return home


def leave_home(home: Path) -> None:
    """Remove what programs left in the home folder of a run."""
    shutil.rmtree(home, ignore_errors=True)


_NOBODY = 1
"""The port that tests use for a server that is not there."""

foreign_connections: list[str] = []
"""Connections of this process to servers that no test has started; each was refused."""


def refuse_foreign_connections() -> None:
    """Refuse and record connections of this process to anything but servers of tests, for as long as it lives."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "socket.connect" or not isinstance(arguments[1], tuple):
            return
        host, port = arguments[1][:2]
        if port >= first_ephemeral or port in own_ports() or port == _NOBODY:
            return
        foreign_connections.append(f"{host}:{port}")
        raise ConnectionRefusedError(f"no test has started a server on {host}:{port}")

    sys.addaudithook(look)
