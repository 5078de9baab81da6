"""Keep a test run apart from the rest of the machine: its environment, home, working folder, ports and servers."""

import atexit
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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


_FIRST_PORT, _BLOCKS, _BLOCK_SIZE = 10_000, 88, 250
"""All blocks lie below 32,768, from where the kernel takes the ports of outgoing connections."""


class PortBlock:
    """A block of TCP ports that this process alone gives to its servers, among all test processes of the machine.

    A name in the kernel's abstract socket namespace stands for the block: it has one owner at most and is free again as
    soon as that process ends, however it ends.
    """

    def __init__(self) -> None:
        owner, first = self._lease()
        atexit.register(owner.close)
        self.ports = range(first, first + _BLOCK_SIZE)
        self._next = 0

    @staticmethod
    def _lease() -> tuple[socket.socket, int]:
        for number in range(_BLOCKS):
            owner = socket.socket(socket.AF_UNIX)
            try:
                owner.bind(f"\0tpo-tests-ports-{number}")
            except OSError:
                owner.close()
                continue
            return owner, _FIRST_PORT + number * _BLOCK_SIZE
        raise RuntimeError(f"{_BLOCKS} test processes run on this machine, and no ports are left for this one")

    def next_free(self) -> int:
        """Return a port on which nobody listens. It is given again only after all others of the block."""
        for _ in self.ports:
            port = self.ports[self._next]
            self._next = (self._next + 1) % len(self.ports)
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            return port
        raise RuntimeError(f"no port from {self.ports.start} to {self.ports.stop - 1} is free")


_block: PortBlock | None = None


def free_port() -> int:
    """Return a TCP port of the loopback address for one server of one test."""
    global _block
    _block = _block or PortBlock()
    return _block.next_free()


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
        own: Iterable[int] = _block.ports if _block else ()
        if port >= first_ephemeral or port in own or port == _NOBODY:
            return
        foreign_connections.append(f"{host}:{port}")
        raise ConnectionRefusedError(f"no test has started a server on {host}:{port}")

    sys.addaudithook(look)
