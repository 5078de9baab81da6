"""Isolate a test run from the rest of the machine: environment, home folder, ports and servers."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testing.ports import own_ports

_KEPT = (
    # Needed by any program.
    "PATH", "USER", "LOGNAME", "SHELL", "TERM", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CI",
    # Python, pytest and coverage.
    "PYTHONPATH", "PYTHONHASHSEED", "PYTEST_*", "COV_*", "COVERAGE_*",
    # Use of this machine's processor by numerical libraries.
    "CUDA_VISIBLE_DEVICES", "OPENBLAS_*", "MKL_*", "NVPL_*", "OMP_NUM_THREADS",
    # Options of the tests themselves.
    "FUZZ_EXAMPLES", "FUZZ_SECONDS", "TPO_TRAJECTORIES", "VLLM_PYTHON",
)  # fmt: skip
"""Variables that tests inherit; `*` matches any ending. Any other would make a run depend on the caller's shell."""

FIXED = {
    "LC_ALL": "C.UTF-8",
    "HF_HUB_OFFLINE": "1",
    # Nothing listens on port 1. A test that needs a broker starts one and sets this variable.
    "TPO_BROKER_URL": "redis://127.0.0.1:1/0",
}
"""Variables with the same value in every run."""


def isolated_environment(inherited: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of a test run that was started in the inherited one."""
    return {name: value for name, value in inherited.items() if is_kept(name)} | FIXED | {"HOME": str(home)}


def is_kept(name: str) -> bool:
    """Return whether tests inherit a variable."""
    return any(name.startswith(kept[:-1]) if kept.endswith("*") else name == kept for kept in _KEPT)


def enter_own_home() -> Path:
    """Switch to the isolated environment with a new, empty home folder, and return that folder."""
    home = Path(tempfile.mkdtemp(prefix="tpo-tests-"))
    isolated = isolated_environment(os.environ, home)
    os.environ.clear()
    os.environ.update(isolated)
    return home


def leave_home(home: Path) -> None:
    """Remove the home folder of a run."""
    shutil.rmtree(home, ignore_errors=True)


_UNUSED_PORT = 1
"""The port of a server that does not exist, for tests of failing connections."""

foreign_connections: list[str] = []
"""Refused connections of this process to servers that no test started, as `host:port`."""


def refuse_foreign_connections() -> None:
    """Refuse and record connections to servers that no test started, until this process ends."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "socket.connect" or not isinstance(arguments[1], tuple):
            return
        host, port = arguments[1][:2]
        if port >= first_ephemeral or port in own_ports() or port == _UNUSED_PORT:
            return
        foreign_connections.append(f"{host}:{port}")
        raise ConnectionRefusedError(f"no test has started a server on {host}:{port}")

    sys.addaudithook(check)
