"""`python -m api`: serve until SIGTERM or Ctrl-C."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from api.app import create_app
from api.connections import ACCEPT_BATCH, KEEP_ALIVE_SECONDS, Connections, GuardedProtocol, raise_file_limit
from api.streaming.broadcaster import EventBroadcaster
from tpo.core.errors import TPOError
from tpo.settings import Settings, format_errors, settings

logger = logging.getLogger("api")

_WAITING_CONNECTIONS = 2048
"""Connections that the kernel holds until they are accepted."""

_GRACE_SECONDS = 5
"""What SIGTERM leaves to requests that run."""


class _Server(uvicorn.Server):
    """Ends in a bounded time, also while streams are open or a thread waits for a database that hangs."""

    def __init__(self, config: uvicorn.Config, broadcaster: EventBroadcaster, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections
        self._broadcaster = broadcaster
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept. More connections may wait in the kernel than are accepted at a time."""
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(_WAITING_CONNECTIONS)

    async def on_tick(self, counter: int) -> bool:
        """Close connections that have waited for too long, once a second."""
        if counter % 10 == 0:
            self._connections.close_expired()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        last_resort = threading.Timer(_GRACE_SECONDS + 3, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()
        self._loop.call_soon_threadsafe(self._broadcaster.stop)
        super().handle_exit(sig, frame)


def main() -> int:
    """Run the server; gives the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _on_signals(_end)
    try:
        configuration = settings()
        open_files = raise_file_limit()
        listener = _listen(configuration)
        asyncio.run(_serve(create_app(configuration), listener, configuration, open_files))
    except ValidationError as error:
        return _refuse(format_errors(error))
    except (TPOError, OSError) as error:
        return _refuse(str(error))
    return 0


async def _serve(app: FastAPI, listener: socket.socket, configuration: Settings, open_files: int) -> None:
    # The lifespan is entered here, not by uvicorn, so that what it refuses reaches the user as one clear line.
    async with app.router.lifespan_context(app):
        host = f"[{configuration.host}]" if ":" in configuration.host else configuration.host
        logger.info("Listening on http://%s:%d, documentation at /docs", host, configuration.port)
        if not (configuration.api_key or configuration.require_key):
            logger.info("No TPO_API_KEY: listening on this machine only, without a key until `tpo keys` creates one")
        connections = Connections(configuration, open_files)
        app.state.broadcaster.max_streams = connections.max_streams
        asyncio.get_running_loop().set_exception_handler(connections.on_loop_error)
        logging.getLogger("uvicorn.error").addFilter(connections.log)
        server = _Server(
            uvicorn.Config(
                app,
                http=partial(GuardedProtocol, connections=connections),  # type: ignore[arg-type]
                backlog=ACCEPT_BATCH,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            ),
            app.state.broadcaster,
            connections,
        )
        # uvicorn listens for signals while it serves, and raises the one that ended it again when it is done.
        _on_signals(signal.SIG_IGN)
        await server.serve(sockets=[listener])


def _listen(configuration: Settings) -> socket.socket:
    host, port = configuration.host, configuration.port
    # The protocol is named because asyncio sets TCP_NODELAY only where it is: without, answers take 40 ms longer.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_WAITING_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise OSError(
            f"Cannot listen on {host} port {port}: {error.strerror}. "
            "Stop what listens there, or choose another address with TPO_HOST and TPO_PORT."
        ) from error
    return listener


def _refuse(why: str) -> int:
    print(f"The API cannot start: {why}", file=sys.stderr)
    return 1


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, handler)


def _end(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
