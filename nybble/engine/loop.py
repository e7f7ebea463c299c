"""The engine in a thread of its own, for asyncio: submit requests, await their tokens.

Three rules keep the two sides apart. The engine belongs to its thread, which gets requests
through a queue. Streams belong to the event loop, which gets tokens through
`call_soon_threadsafe`, once a step. Aborts are marks that the engine reads between steps.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType

from nybble.engine.constraint import Constraint
from nybble.engine.engine import Engine
from nybble.engine.request import Request, Timing, Token
from nybble.engine.sampler import TokenLogprob
from nybble.errors import BusyError, NybbleError, UnavailableError
from nybble.sampling import SamplingParams

logger = logging.getLogger("nybble")


@dataclass(frozen=True)
class _News:
    """What a step made of a request, as it was then: the request itself may be further by now."""

    request: Request
    tokens: list[Token]
    done: bool


class AsyncEngine:
    """Serves one event loop: use it as `async with AsyncEngine(engine) as running:`.

    max_waiting: how many requests may wait beside those that run before more are refused.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256) -> None:
        self.engine = engine
        self.most = engine.max_running + max_waiting
        self._streams: dict[Request, AsyncGeneration] = {}
        self._inbox: SimpleQueue[Request | None] = SimpleQueue()  # None: stop
        self._empty = asyncio.Event()
        self._empty.set()
        self._refusal: str | None = "The engine has not been started: use it as a context."
        self._thread = threading.Thread(target=self._serve, name="nybble-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    async def __aenter__(self) -> AsyncEngine:
        self._loop = asyncio.get_running_loop()
        self._refusal = None
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def available(self) -> bool:
        """Whether requests are taken: started, not draining, not broken."""
        return self._refusal is None

    @property
    def unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._streams)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        constraint: Constraint | None = None,
    ) -> AsyncGeneration:
        """Queue a request. Raises what Engine.request and check_room do."""
        self.check_room(1)
        request = self.engine.request(prompt_ids, params, constraint)
        stream = self._streams[request] = AsyncGeneration(self.engine, request)
        self._empty.clear()
        self._inbox.put(request)
        return stream

    def check_room(self, count: int) -> None:
        """BusyError or UnavailableError unless so many more requests are taken just now."""
        if self._refusal is not None:
            raise UnavailableError(self._refusal)
        if len(self._streams) + count > self.most:
            raise BusyError(
                f"{len(self._streams)} requests are waiting or running: try again in a moment."
            )

    async def drain(self) -> None:
        """Take no more requests and wait until the present ones have ended."""
        self._refusal = self._refusal or "The server is shutting down: try again later."
        await self._empty.wait()

    async def close(self) -> None:
        """Stop after the present step; requests that have not ended get an UnavailableError."""
        self._refusal = self._refusal or "The engine is closed: start another one."
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._end_all(UnavailableError("The server was shut down: send the request again."))

    # -- in the event loop's thread ------------------------------------------------------------

    def _hand_over(self, step: list[_News]) -> None:
        for news in step:
            request, stream = news.request, self._streams[news.request]
            stream._receive(news.tokens)
            if news.done:
                stream._finish(request.finish_reason, request.error)
                del self._streams[request]
        if not self._streams:
            self._empty.set()

    def _end_all(self, error: NybbleError) -> None:
        for stream in self._streams.values():
            stream._finish(None, error)
        self._streams.clear()
        self._empty.set()

    def _break(self, error: BaseException) -> None:
        """The thread has died of a bug: nobody shall wait for it."""
        self._refusal = f"The engine has stopped ({type(error).__name__}): restart the server."
        self._end_all(UnavailableError(self._refusal))

    # -- in the engine's thread ----------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._take_in():
                self._step()
        except BaseException as error:
            logger.exception("The engine's thread stopped")
            self._loop.call_soon_threadsafe(self._break, error)

    def _take_in(self) -> bool:
        """Queue what was submitted, waiting for it when there is nothing to do. False: stop."""
        try:
            while True:
                request = self._inbox.get(block=self.engine.idle)
                if request is None:
                    return False
                self.engine.add(request)
                if request.done:  # aborted on its way here
                    self._post([request])
        except Empty:
            return True

    def _step(self) -> None:
        alive = self.engine.alive
        try:
            changed = self.engine.step()
        except (NybbleError, RuntimeError, MemoryError):  # out of memory, a failing device
            logger.exception("A step of the engine failed; its requests were ended")
            changed = alive
        self._post(changed)

    def _post(self, changed: list[Request]) -> None:
        step = [_News(request, _taken(request.news), request.done) for request in changed]
        self._loop.call_soon_threadsafe(self._hand_over, step)


class AsyncGeneration(AsyncIterator[int]):
    """The answer to a submitted request: iterate it for tokens; the fields are Generation's.

    `close` ends it at the next step, whoever still waits for it gets no further token.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.prompt_ids = request.prompt_ids
        self.params = request.params
        self.timing: Timing = request.timing
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs = request.prompt_logprobs
        self.finish_reason: str | None = None
        self._engine, self._request = engine, request
        self._tokens: deque[Token] = deque()
        self._reason: str | None = None
        self._error: NybbleError | None = None
        self._ended = False
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether the next token is there already."""
        return bool(self._tokens)

    async def __anext__(self) -> int:
        while not self._tokens and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        token = self._tokens.popleft() if self._tokens else None
        if token is None and self._error is not None:
            raise self._error
        if self._ended and not self._tokens:
            self.finish_reason = self._reason
        if token is None:
            raise StopAsyncIteration
        self.token_ids.append(token.id)
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        return token.id

    def close(self, error: NybbleError | None = None) -> None:
        """Abandon the request: the next step gives its pages back. error: what its reader gets."""
        self._engine.abort(self._request)
        if self._tokens:  # however it ended, its reader has not got all of it
            self._ended = False
            self._tokens.clear()
        self._finish(None, error)

    def _receive(self, tokens: list[Token]) -> None:
        if not self._ended:
            self._tokens.extend(tokens)
            self._changed.set()

    def _finish(self, reason: str | None, error: NybbleError | None) -> None:
        if not self._ended:
            self._ended, self._reason, self._error = True, reason, error
            self._changed.set()


def _taken(news: deque[Token]) -> list[Token]:
    tokens = list(news)
    news.clear()
    return tokens
