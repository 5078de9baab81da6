"""Free TCP ports for the servers of tests and benchmarks."""

import atexit
import socket
from collections.abc import Sequence

FIRST_PORT, _BLOCKS, BLOCK_SIZE = 10_000, 88, 250
"""All blocks lie below 32,768, where the kernel's ports for outgoing connections begin."""


class PortBlock:
    """A block of TCP ports reserved for the servers of this process, among all test processes of the machine.

    A name in the kernel's abstract socket namespace represents the block. It has at most one owner, and the kernel
    frees it as soon as that process ends, even if it is killed.
    """

    def __init__(self) -> None:
        owner, first = self._lease()
        atexit.register(owner.close)
        self.ports = range(first, first + BLOCK_SIZE)
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
            return owner, FIRST_PORT + number * BLOCK_SIZE
        raise RuntimeError(f"all {_BLOCKS} port blocks are in use by test processes of this machine: end some of them")

    def next_free(self) -> int:
        """Return a port on which no process listens. It is reused only after all others of the block."""
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


def own_ports() -> Sequence[int]:
    """Return the ports reserved for this process; none before the first call of `free_port`."""
    return _block.ports if _block else ()
