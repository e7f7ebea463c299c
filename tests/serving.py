"""A real server on a free port, in a thread of this process, for real clients."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn

from nybble.llm import LLM
from nybble.serve.app import create_app
from nybble.serve.host import Host
from nybble.serve.settings import ServerSettings


class Serving:
    """A running server: `url` without a slash at its end, `host` for looking inside."""

    def __init__(self, url: str, host: Host) -> None:
        self.url = url
        self.host = host

    @property
    def engine(self):
        return self.host.service.engine

    def client(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, **options)

    def wait_until_idle(self) -> None:
        """Return when no request is left anywhere, and every page is accounted for."""
        engine = self.engine
        wait_for(lambda: engine.unfinished == 0 and engine.engine.idle)
        assert engine.engine.load.pages_used == 0
        engine.engine.scheduler.check()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def serving(
    llm: LLM | Callable[[], LLM], *, ready: bool = True, **options: Any
) -> Iterator[Serving]:
    """Serve `llm`, or what it returns. Options are those of ServerSettings."""
    settings = ServerSettings(**{"names": ("toy",), "port": 0, **options})
    load = (lambda: llm) if isinstance(llm, LLM) else llm
    app = create_app(load, settings)
    with socket.create_server((settings.host, 0)) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            found = Serving(f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.host)
            if ready:
                wait_for(lambda: found.host.status == "ready")
            yield found
        finally:
            server.should_exit = True
            thread.join()
