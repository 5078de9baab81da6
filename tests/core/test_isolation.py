"""A test run uses nothing of the machine except what it started itself."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.ports import BLOCK_SIZE, FIRST_PORT, PortBlock, free_port, own_ports
from tests.support import isolation
from tests.support.isolation import isolated_environment

ROOT = Path(__file__).parents[2]
HOLD_A_BLOCK = "from testing.ports import PortBlock; print(PortBlock().ports.start, flush=True); input()"


def test_isolated_environment_drops_configuration() -> None:
    inherited = {
        "TPO_API_KEY": "x",
        "TPO_BROKER_URL": "redis://elsewhere/0",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "FLOWER_PORT": "1",
        "OPENAI_API_KEY": "x",
        "PGHOST": "elsewhere",
        "HF_HOME": "/elsewhere",
        "NO_COLOR": "1",
        "PYTHONWARNINGS": "error",
        "KUBERNETES_SERVICE_HOST": "elsewhere",
        "PATH": "/bin",
        "OPENBLAS_CORETYPE": "Haswell",
    }
    isolated = isolated_environment(inherited, Path("/home/of/the/run"))
    assert isolated == {
        "PATH": "/bin",
        "OPENBLAS_CORETYPE": "Haswell",
        "HOME": "/home/of/the/run",
        "LC_ALL": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "TPO_BROKER_URL": "redis://127.0.0.1:1/0",
    }


def test_current_run_is_isolated(tmp_path: Path) -> None:
    assert os.environ.items() >= isolation.FIXED.items()
    others = [name for name in os.environ if name not in isolation.FIXED and not isolation.is_kept(name)]
    assert not [n for n in others if n.startswith(("TPO_", "FLOWER_", "PG")) or n.lower().endswith("_proxy")]
    assert Path.home().name.startswith("tpo-tests-")
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


@pytest.fixture
def other_process() -> Iterator["subprocess.Popen[str]"]:
    """Yield another test process of this machine, which holds a block of ports."""
    command = [sys.executable, "-c", HOLD_A_BLOCK]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.kill()


@pytest.mark.processes
def test_two_processes_share_no_port(other_process: "subprocess.Popen[str]") -> None:
    assert other_process.stdout
    theirs = int(other_process.stdout.readline())
    assert free_port() not in range(theirs, theirs + BLOCK_SIZE)
    assert theirs != own_ports()[0]


@pytest.mark.processes
def test_port_block_of_killed_process_is_released(other_process: "subprocess.Popen[str]") -> None:
    assert other_process.stdout
    theirs = (int(other_process.stdout.readline()) - FIRST_PORT) // BLOCK_SIZE
    name = f"\0tpo-tests-ports-{theirs}"
    with socket.socket(socket.AF_UNIX) as taken, pytest.raises(OSError, match="in use"):
        taken.bind(name)
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(name)


def test_port_block_skips_port_in_use() -> None:
    block = PortBlock()
    with socket.create_server(("127.0.0.1", block.ports[0])):
        assert block.next_free() == block.ports[1]


@pytest.mark.parametrize("port", [5432, 5555, 6379, 6479, 8000])
def test_foreign_connection_is_refused(port: int) -> None:
    with pytest.raises(ConnectionRefusedError, match="no test has started a server"):
        socket.create_connection(("127.0.0.1", port))
    assert isolation.foreign_connections == [f"127.0.0.1:{port}"]
    isolation.foreign_connections.clear()
