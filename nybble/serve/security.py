"""What stands before every route: ids and the log line, names, the key, the size of a body."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.serve.errors import ApiError, too_large, unauthorised, unknown_host
from nybble.serve.metrics import Metrics
from nybble.serve.record import RequestRecord

logger = logging.getLogger("nybble.serve")

_GENERATING = ("/v1/chat/completions", "/v1/completions")
_BODY_SECONDS = 60.0
# What somebody asks every few seconds: no line each.
_POLLED = ("/health", "/metrics")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def refusal(scope: Scope, error: ApiError) -> JSONResponse:
    """The answer to a request that goes no further, which is counted where it asked for text."""
    record: RequestRecord = scope["state"]["record"]
    # One that ran and failed has been counted already.
    if record.reason is None:
        record.reason = error.label
        if scope["path"] in _GENERATING:
            record.rejected(error.label)
    return JSONResponse(error.body, error.status, error.headers)


class Recorder:
    """Gives each request an id (its own x-request-id where that is sane) and one log line."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_request_id(Headers(scope=scope)), self.metrics)
        scope.setdefault("state", {})["record"] = record
        status = 499  # what nginx calls a client that hung up

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:  # only noted: the framework around this answers with it, and logs it
            status = 500
            raise
        finally:
            _log(scope, record, status)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


def _log(scope: Scope, record: RequestRecord, status: int) -> None:
    # The route, not the path: what a client makes up stays out of the log.
    route = getattr(scope.get("route"), "path", "-")
    tokens = f"{record.prompt_tokens} + {record.new_tokens} tokens"
    ended = "done" if status < 400 else "abort" if status == 499 else "error"
    logger.log(
        logging.DEBUG if route in _POLLED else logging.INFO,
        "%s %s %s %d %s, %s, %.3f s",
        record.id,
        scope["method"],
        route,
        status,
        record.reason or ended,
        tokens,
        record.seconds,
    )


class HostCheck:
    """403 for requests under another name than this machine's own.

    Any web page can point a name of its own at 127.0.0.1, and is then in the eyes of its
    visitor's browser allowed to talk to a server there (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = re.sub(r":\d+$", "", Headers(scope=scope).get("host", ""))
            if name.lower() not in _LOCAL_NAMES:
                await refusal(scope, unknown_host())(scope, receive, send)
                return
        await self.app(scope, receive, send)


class KeyCheck:
    """401 without the API key, but for what is no secret: the page's files, and /health."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _public(scope["path"]):
            given = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, self._expected):
                await refusal(scope, unauthorised())(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _public(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/page/")


class BodyLimit:
    """413 for a body of more than `most` bytes, whether its length is told before or not."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            await refusal(scope, error)(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client has gone before its end."""
        told = headers.get("content-length", "0")
        if told.isdigit() and int(told) > self.most:
            raise too_large(self.most)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.most:
                        raise too_large(self.most)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"The request's body did not come within {_BODY_SECONDS:g} seconds: send it again.",
                code="request_timeout",
            ) from error


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first, and then what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
