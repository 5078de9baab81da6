"""Forked Python processes behave like newly started ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testing.forking import ForkedPython
from testing.waiting import HANG_SECONDS

pytestmark = pytest.mark.processes

WAITS = "print('up', flush=True); input()"
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def forked(*command: str, **more: Any) -> ForkedPython:
    """Return a process that was forked, not started as a new interpreter."""
    process = ForkedPython(command, **{"env": {**os.environ, **more.pop("env", {})}, **PIPES, **more})
    assert process._forks
    return process


@pytest.mark.parametrize(
    "program",
    [
        "import sys; print(__name__, sys.argv, sys.path[0])",
        "import os; print(os.getcwd(), sorted(os.environ.items()))",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('a message')",
        "import sys; print(sys.stdin.read() or 'nothing', sys.stdout.isatty())",
        "import atexit; atexit.register(print, 'at exit')",
        "import dataclasses; print(dataclasses.make_dataclass('A', ['x'])(1))",
        "import signal; print([n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN])",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.kill(os.getpid(), 2)",
    ],
)
def test_forked_program_behaves_like_started_one(program: str, tmp_path: Path) -> None:
    environment = {**os.environ, "A_VARIABLE": "of this process"}
    results = []
    for process in (
        forked("-c", program, "a word", env=environment, cwd=tmp_path),
        subprocess.Popen([sys.executable, "-c", program, "a word"], env=environment, cwd=tmp_path, **PIPES),
    ):
        stdout, stderr = process.communicate("", timeout=HANG_SECONDS)
        results.append((process.returncode, stdout, stderr.splitlines()[-1:]))
    assert results[0] == results[1]


def test_forked_module_receives_arguments(tmp_path: Path) -> None:
    (tmp_path / "own_module.py").write_text("import sys; print(__name__, sys.argv[1:], __file__)")
    process = forked("-m", "own_module", "a", "b", cwd=tmp_path)
    assert process.communicate(timeout=HANG_SECONDS)[0] == f"__main__ ['a', 'b'] {tmp_path}/own_module.py\n"


def test_forked_process_is_a_child_and_can_be_killed() -> None:
    process = forked("-c", "import os; print(os.getppid(), flush=True); input()")
    assert process.stdout
    assert int(process.stdout.readline()) == os.getpid()
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == -signal.SIGKILL


def test_forked_processes_share_no_random_numbers() -> None:
    program = "import random, uuid, tempfile; print(random.random(), uuid.uuid4(), tempfile.mktemp())"
    first, second = (forked("-c", program).communicate(timeout=HANG_SECONDS)[0].split() for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.parametrize("variable", ["PYTHONPATH", "PYTHONWARNINGS", "LC_ALL", "TZ"])
def test_other_interpreter_settings_start_new_process(variable: str, tmp_path: Path) -> None:
    with ForkedPython(["-c", "pass"], env={**os.environ, variable: str(tmp_path)}) as process:
        assert not process._forks
