"""Run the API server: `python -m api` serves until SIGTERM or Ctrl-C."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from api.app import create_app
from api.streaming.broadcaster import EventBroadcaster
from tpo.core.errors import TPOError
from tpo.settings import Settings, format_errors, settings

logger = logging.getLogger("api")

_GRACE_SECONDS = 5
"""Time for running requests to finish after SIGTERM."""


class _Server(uvicorn.Server):
    """A uvicorn server that stops in bounded time, even with open streams or a thread blocked on the database."""

    def __init__(self, config: uvicorn.Config, broadcaster: EventBroadcaster) -> None:
        super().__init__(config)
        self._broadcaster = broadcaster
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        last_resort = threading.Timer(_GRACE_SECONDS + 3, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()
        self._loop.call_soon_threadsafe(self._broadcaster.stop)
        super().handle_exit(sig, frame)


def main() -> int:
    """Run the server and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _on_signals(_end)
    try:
        configuration = settings()
        listener = _listen(configuration)
        asyncio.run(_serve(create_app(configuration), listener, configuration))
    except ValidationError as error:
        return _refuse(format_errors(error))
    except (TPOError, OSError) as error:
        return _refuse(str(error))
    return 0


async def _serve(app: FastAPI, listener: socket.socket, configuration: Settings) -> None:
    # The lifespan is entered here, not by uvicorn, so that a startup error reaches the user as one clear line.
    async with app.router.lifespan_context(app):
        host = f"[{configuration.host}]" if ":" in configuration.host else configuration.host
        logger.info("Listening on http://%s:%d, documentation at /docs", host, configuration.port)
        if not (configuration.api_key or configuration.require_key):
            logger.info("No TPO_API_KEY: listening on this machine only, without a key until `tpo keys` creates one")
        server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            ),
            app.state.broadcaster,
        )
        # uvicorn handles signals while it serves, and raises the signal that stopped it again afterwards.
        _on_signals(signal.SIG_IGN)
        await server.serve(sockets=[listener])


def _listen(configuration: Settings) -> socket.socket:
    host, port = configuration.host, configuration.port
    # The protocol is explicit because asyncio sets TCP_NODELAY only then; without it, responses are delayed.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
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


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, handler)


def _end(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
