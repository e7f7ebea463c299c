"""Runs the application: the socket, signals, and a shutdown that lets streams finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from nybble.errors import ConfigError
from nybble.serve.app import create_app
from nybble.serve.host import Host, Loader
from nybble.serve.settings import ServerSettings

logger = logging.getLogger("nybble.serve")

# How long a connection may idle, and how long the last bytes may take when all has ended.
_IDLE_SECONDS, _GOODBYE_SECONDS = 30, 5


def run(
    load: Loader,
    settings: ServerSettings,
    announce: Callable[[str], None] = logger.info,
) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers finish and return.

    announce is told where, once connections are taken. Raises ConfigError for an address that
    cannot be had, and whatever `load` raised.
    """
    listener = _listen(settings)
    with listener:
        app = create_app(load, settings, on_failure=lambda: server.stop())
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_GOODBYE_SECONDS,
        )
        server = _Server(config, lambda: getattr(app.state, "host", None))
        announce(_url(listener))
        server.run(sockets=[listener])
    failure = app.state.host.failure
    if failure is not None:
        raise failure


def _listen(settings: ServerSettings) -> socket.socket:
    """Bound before the model is loaded: an address that is taken is found at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"The server cannot listen on {settings.host}, port {settings.port} "
            f"({error.strerror or error}): choose another --host or --port."
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/"


class _Server(uvicorn.Server):
    """The first signal drains, the second one stops at once. Either way run() returns."""

    def __init__(self, config: uvicorn.Config, host: Callable[[], Host | None]) -> None:
        super().__init__(config)
        self._host = host
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # A signal handler: the loop may be in the middle of anything.
        self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """In the event loop: begin to drain, or give up on what still runs."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        host = self._host()
        if host is not None:
            await host.drain()
        self.should_exit = True
