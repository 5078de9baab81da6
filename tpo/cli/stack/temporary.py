"""A temporary stack: `tpo up` as a child process, on free ports and in its own folder."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpo.cli.stack.supervisor import die_with
from tpo.cli.ui.output import Failure

_NOT_INHERITED = {"TPO_DATABASE_URL", "TPO_BROKER_URL", "TPO_API_KEY", "TPO_HOST", "TPO_FLOWER_HOST"}
_STOP_SECONDS = 60.0


@dataclass
class Stack:
    """A running `tpo up`: its process, the process ids by service, and the facts of its `ready` event."""

    process: "subprocess.Popen[str]"
    pids: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@contextmanager
def temporary_stack(folder: Path, environment: Mapping[str, str]) -> Iterator[Stack]:
    """Start a stack, yield it when it is ready, and stop it.

    `environment` overrides variables of this process. Raises Failure if the stack does not start.
    """
    ports = _free_ports(3)
    options = [
        word
        for name, port in zip(("--port", "--flower-port", "--broker-port"), ports, strict=True)
        for word in (name, str(port))
    ]
    inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
    parent = os.getpid()
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "tpo", "up", "--json", "--data-dir", str(folder / "data"), *options],
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
    stack = Stack(process)
    try:
        if process.stdout is None:
            raise Failure("tpo up has no output")
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "started":
                stack.pids[event["service"]] = event["pid"]
            if event["event"] == "ready":
                stack.facts = event
                break
        else:
            raise Failure(f"tpo up did not start: {(folder / 'up.log').read_text(errors='replace').strip()}")
        yield stack
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        with process:
            process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
