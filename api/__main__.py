"""Run the API server: `python -m api` serves until SIGTERM or Ctrl-C."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from api.app import create_app
from api.connections import ACCEPT_BATCH, KEEP_ALIVE_SECONDS, Connections, GuardedProtocol, raise_file_limit
from api.shutdown import ShutdownWatchdog
from api.streaming.broadcaster import EventBroadcaster
from tpo.core.errors import TPOError
from tpo.settings import Settings, format_errors, settings

logger = logging.getLogger("api")

_WAITING_CONNECTIONS = 2048
"""Connections that the kernel holds until they are accepted."""

_GRACE_SECONDS = 5
"""Time for running requests to finish after SIGTERM."""

_SHUTDOWN_SECONDS = _GRACE_SECONDS + 3.0


class _Server(uvicorn.Server):
    """Ends open streams when a stop signal arrives, and reports the stages of its shutdown."""

    def __init__(
        self,
        config: uvicorn.Config,
        broadcaster: EventBroadcaster,
        watchdog: ShutdownWatchdog,
        connections: Connections,
    ) -> None:
        super().__init__(config)
        self._connections = connections
        self._broadcaster = broadcaster
        self._watchdog = watchdog
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
        self._watchdog.begin()
        self._loop.call_soon_threadsafe(self._broadcaster.stop)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listener and all connections, and wait for running requests."""
        state = self.server_state
        self._watchdog.log_stage(f"closing {len(state.connections)} connections, {len(state.tasks)} requests run")
        await super().shutdown(sockets)
        self._watchdog.log_stage("connections closed")


def main() -> int:
    """Run the server and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _on_signals(_end)
    watchdog = ShutdownWatchdog(_SHUTDOWN_SECONDS)
    watchdog.start()
    try:
        configuration = settings()
        open_files = raise_file_limit()
        listener = _listen(configuration)
        asyncio.run(_serve(create_app(configuration), listener, configuration, watchdog, open_files))
        watchdog.log_stage("event loop closed")
    except ValidationError as error:
        return _refuse(format_errors(error))
    except (TPOError, OSError) as error:
        return _refuse(str(error))
    return 0


async def _serve(
    app: FastAPI, listener: socket.socket, configuration: Settings, watchdog: ShutdownWatchdog, open_files: int
) -> None:
    watchdog.watch_loop()
    # The lifespan is entered here, not by uvicorn, so that a startup error reaches the user as one clear line.
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
            watchdog,
            connections,
        )
        # uvicorn handles signals while it serves, and raises the signal that stopped it again afterwards. A signal just
        # before or after must not be ignored: it would be lost.
        _on_signals(server.handle_exit)
        await server.serve(sockets=[listener])
        watchdog.log_stage("requests ended")
    watchdog.log_stage("broadcaster, broker and database closed")


def _listen(configuration: Settings) -> socket.socket:
    host, port = configuration.host, configuration.port
    # The protocol is explicit because asyncio sets TCP_NODELAY only then; without it, responses are delayed.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_WAITING_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise OSError(
            f"Cannot listen on {host} port {port}: {error.strerror}. "
            "Stop the process that uses it, or set TPO_HOST and TPO_PORT to another address."
        ) from error
    return listener


def _refuse(why: str) -> int:
    print(f"The API cannot start: {why}", file=sys.stderr)
    return 1


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, handler)


def _end(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
