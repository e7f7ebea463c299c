"""The model's life behind the HTTP server: loading, ready, draining, gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from fastapi import Request

from nybble.engine.loop import AsyncEngine
from nybble.errors import UnavailableError
from nybble.llm import LLM
from nybble.serve.daemon import in_daemon
from nybble.serve.errors import unavailable
from nybble.serve.metrics import Metrics
from nybble.serve.record import RequestRecord
from nybble.serve.service import Service
from nybble.serve.settings import ServerSettings

logger = logging.getLogger("nybble")

Loader = Callable[[], LLM]


class Host:
    """Loads a model in the background, runs its engine, and says whether requests are taken.

    `async with` it for as long as the server runs. on_failure is called when loading has failed;
    the reason is in `failure` then.
    """

    def __init__(
        self,
        load: Loader,
        settings: ServerSettings,
        metrics: Metrics,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.failure: Exception | None = None
        self._load = load
        self._on_failure = on_failure or self._log_failure
        self._service: Service | None = None
        self._draining = False

    async def __aenter__(self) -> Host:
        self._loading = asyncio.create_task(self._start())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._draining = True
        self._loading.cancel()
        with suppress(asyncio.CancelledError):
            await self._loading
        if self._service is not None:
            await self._service.engine.close()

    async def _start(self) -> None:
        try:
            llm = await in_daemon(self._load, "nybble-loading")
            engine = AsyncEngine(llm.engine, self.settings.max_waiting)
            service = Service(
                llm,
                engine,
                self.settings.names,
                request_seconds=self.settings.request_seconds,
                log_prompts=self.settings.log_prompts,
            )
        except Exception as error:  # noqa: BLE001, whoever runs the server raises it
            self.failure = error
            self._on_failure()
            return
        await engine.__aenter__()
        self.metrics.watch(llm.engine)
        self._service = service

    def _log_failure(self) -> None:
        logger.error("The model could not be loaded: %s", self.failure)

    @property
    def status(self) -> str:
        """One of loading, failed, ready, draining, broken (the engine died of a bug)."""
        if self.failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        if self._service is None:
            return "loading"
        return "ready" if self._service.engine.available else "broken"

    @property
    def service(self) -> Service:
        """The loaded model; ApiError 503 while there is none, or none for new requests."""
        if self.failure is not None:
            raise unavailable(
                "The model could not be loaded: the server's own output says why.", "failed", 60
            )
        if self._draining:
            raise unavailable("The server is shutting down: try again later.", "draining", 30)
        if self._service is None:
            raise unavailable("The model is still being loaded: try again soon.", "loading")
        return self._service

    async def drain(self) -> None:
        """Take no new requests; return when those that run have ended.

        When the time is up, the others are ended with an error.
        """
        self._draining = True
        if self._service is None:
            return
        engine = self._service.engine
        try:
            async with asyncio.timeout(self.settings.drain_seconds):
                await engine.drain()
        except TimeoutError:
            await engine.close()


def host_of(request: Request) -> Host:
    host = request.app.state.host
    if not isinstance(host, Host):
        raise UnavailableError("The server has not been started: run its lifespan.")
    return host


def record_of(request: Request) -> RequestRecord:
    """What is written down of this request; made by the outermost layer of the app."""
    record: RequestRecord = request.state.record
    return record
