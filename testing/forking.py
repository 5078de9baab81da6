"""Start Python processes by forking a template that has already imported everything, in a tenth of the time.

Tests start hundreds of workers, servers and commands, and on two cores the same imports would take most of a run. The
forked process runs `python -m ...` or `python -c ...` with its own arguments, environment, working folder and files. It
is a child of this process, as if `subprocess.Popen` had started it. Starts without a template are tested where the
product makes them: by `tpo up`, the demo and the Compose file. Only a test run forks; benchmarks and
`python -m tests.chaos` start every process from scratch.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testing.waiting import HANG_SECONDS
from tpo.cli.stack.supervisor import die_with

_ROOT = Path(__file__).parents[1]
_MAX_REQUEST = 150_000
_PR_SET_CHILD_SUBREAPER = 36
_IMPORTED = (
    "alembic.command",
    "celery.apps.worker",
    "kombu.transport.redis",
    "psycopg",
    "redis",
    "rich.console",
    "typer",
    "uvicorn.protocols.http.h11_impl",
    "api.app",
    "tpo.backends.scripted",
    "tpo.backends.remote",
    "tpo.cli",
    "tpo.client",
    "tpo.db.postgresql",
    "tpo.db.schema",
    "tpo.store",
    "tpo.broker",
    "worker.celery.app",
    "worker.tasks.batches",
    "worker.tasks.webhooks",
    "worker.startup",
    "worker.tasks",
)
"""Modules that most processes import. Importing them reads no environment, opens no file and starts no thread."""


_enabled = False


def enable() -> None:
    """Fork from now on, whenever that is equivalent to starting a process."""
    global _enabled
    _enabled = True


class ForkedPython(subprocess.Popen[Any]):
    """A Python process, forked if that is enabled and equivalent. `command` holds the arguments of `python`.

    With `dies_with_parent` the kernel kills it when this process ends.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], dies_with_parent: bool = False, **options: Any
    ) -> None:
        equivalent = command[0] in ("-m", "-c") and _interpreter_settings(env) == _interpreter_settings(os.environ)
        self._forks = equivalent and _enabled
        self._dies_with_parent = dies_with_parent
        parent = os.getpid()
        if dies_with_parent:
            options["preexec_fn"] = lambda: die_with(parent)
        super().__init__([sys.executable, *command], env=env, **options)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *rest: Any) -> None:
        if not self._forks:
            super()._execute_child(args, executable, preexec_fn, *rest)  # type: ignore[misc]
            return
        sys.audit("subprocess.Popen", sys.executable, args, None, None)
        options = ("close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags", "shell")
        files = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        more = ("restore_signals", "gid", "gids", "uid", "umask", "start_new_session", "process_group")
        given = dict(zip((*options, *files, *more), rest, strict=True))
        ends = (given["p2cread"], given["c2pwrite"], given["errwrite"])
        request = {
            "command": args[1:],
            "env": dict(given["env"]),
            "cwd": str(given["cwd"] or os.getcwd()),
            "ignored": [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN],
            "new_session": given["start_new_session"],
            "parent": os.getpid() if self._dies_with_parent else None,
        }
        self.pid = _template().fork(request, [end if end != -1 else number for number, end in enumerate(ends)])
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in files))  # type: ignore[attr-defined]


def run_python(
    *command: str, env: Mapping[str, str], stdin: str = "", cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a Python command to its end, like `subprocess.run`."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ForkedPython(command, env=env, cwd=cwd, text=True, **pipes) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=HANG_SECONDS)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _interpreter_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that Python itself reads at start: a forked process inherits them from the template."""
    names = ("PYTHON", "LC_", "LANG", "LD_", "TZ")
    ours = ("PYTHONPATH", str(_ROOT))  # the template always has it
    return {name: value for name, value in environment.items() if name.startswith(names) and (name, value) != ours}


class _Template:
    """The process that has imported everything and forks on request."""

    def __init__(self) -> None:
        # Orphans become children of the nearest subreaper, so this process can wait for those forked on its behalf.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "testing.forking", str(theirs.fileno())],
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._channel = ours
        self._lock = threading.Lock()
        atexit.register(self._end)

    def _end(self) -> None:
        self._channel.close()  # this ends the template
        self._process.wait()

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """Fork a process with these standard files and return its id."""
        message = json.dumps(request).encode()
        assert len(message) < _MAX_REQUEST
        with self._lock:
            socket.send_fds(self._channel, [message], list(files))
            answer = self._channel.recv(100)
        assert answer, "the template ended"
        return int(answer)


@functools.cache
def _template() -> _Template:
    return _Template()


def _serve(channel: socket.socket) -> list[str]:
    """Fork on each request. Return in a forked process, with its command."""
    for module in _IMPORTED:
        importlib.import_module(module)
    assert threading.active_count() == 1, "an import started a thread, which no forked process would have"
    gc.collect()
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(channel, _MAX_REQUEST, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            if (forked := os.fork()) == 0:
                os.close(reading)
                os.close(writing)
                channel.close()
                while os.getppid() == middle:
                    time.sleep(0.0005)  # until the middle process has ended and the requester is this one's parent
                return _become(json.loads(message), files)
            os.write(writing, str(forked).encode())
            os._exit(0)
        os.waitpid(middle, 0)
        channel.send(os.read(reading, 100))
        for file in (reading, writing, *files):
            os.close(file)


def _become(request: dict[str, Any], files: Sequence[int]) -> list[str]:
    """Apply a request's process attributes to this process, and return its command."""
    if request["parent"] is not None:
        die_with(request["parent"])
    if request["new_session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    command: list[str] = request["command"]
    return command


def _run(command: list[str]) -> None:
    """Run the command like `python` with these arguments."""
    option, program, *arguments = command
    sys.path.insert(0, os.getcwd() if option == "-m" else "")
    if option == "-m":
        sys.argv[:] = [program, *arguments]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *arguments]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
