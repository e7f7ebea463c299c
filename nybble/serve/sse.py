"""Answers to a client that may hang up: as server-sent events, or whole."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from nybble.errors import NybbleError
from nybble.serve.errors import as_api_error
from nybble.serve.settings import ServerSettings

T = TypeVar("T")
# For a reader to take the error that ends a request whose time is up.
_GRACE_SECONDS = 5.0


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(
    receive: Receive, work: Coroutine[None, None, T], seconds: float | None = None
) -> T:
    """The result of `work`, which is cancelled when the client hangs up: ClientGoneError.

    receive: where ASGI tells of it, once the request's body has been read. After `seconds` a
    client counts as gone that does not take what it is sent.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hangs_up(receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hangs_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends each text of `events` as one event, then [DONE]; empty texts are left out.

    A comment goes out after keep_alive_seconds of silence (a queue, a long prompt), so that
    nothing between here and the client takes the connection for dead. An error becomes an event.
    However the stream ends, `events` is closed, a little after request_seconds at the latest.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, events: AsyncGenerator[str], settings: ServerSettings) -> None:
        # X-Accel-Buffering: nginx would hold events back.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._keep_alive = settings.keep_alive_seconds
        self._seconds = settings.request_seconds + _GRACE_SECONDS
        self._last = time.monotonic()

    @classmethod
    async def open(cls, events: AsyncGenerator[str], settings: ServerSettings) -> EventStream:
        """Get the first event before the response begins: what it raises has its own status.

        That also starts `events`, without which closing it would do nothing.
        """
        return cls(await anext(events), events, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            pulse = asyncio.ensure_future(self._pulse(send))
            try:
                await while_connected(receive, self._send_all(send), self._seconds)
            except ClientGoneError:
                return
            finally:
                pulse.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        await self._send_event(send, self._first)
        try:
            async for event in self._events:
                await self._send_event(send, event)
        except NybbleError as error:
            body = as_api_error(error).body
            await self._send_event(send, json.dumps(body, ensure_ascii=False))
        await self._send_event(send, "[DONE]")

    async def _send_event(self, send: Send, event: str) -> None:
        if event:
            await self._send(send, f"data: {event}\n\n")
            # Several may be there at once: let the news in that the client has gone.
            await asyncio.sleep(0)

    async def _send(self, send: Send, text: str) -> None:
        self._last = time.monotonic()
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def _pulse(self, send: Send) -> None:
        while True:
            silence = time.monotonic() - self._last
            if silence >= self._keep_alive:
                await self._send(send, ": keep-alive\n\n")
                silence = 0.0
            await asyncio.sleep(self._keep_alive - silence)
