"""The chat page beside a stand-in for the model, which says what the test wants; and its reader."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from playwright.sync_api import Locator, Page, expect

from nybble.serve import page


@dataclass
class Script:
    """What the model says next. hold: pieces before the stream waits for `go`.

    status: an HTTP error instead of an answer; cut: the stream breaks off after its pieces.
    """

    pieces: list[str] = field(default_factory=lambda: ["Hello", " there."])
    hold: int | None = None
    finish: str = "stop"
    status: int = 200
    cut: bool = False
    error: str | None = None
    pause: float = 0.0


class ScriptedServer:
    """Use as a context: `url` to open, `script` to set, `requests` to look at."""

    def __init__(self) -> None:
        self.reset()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        config = uvicorn.Config(self._app(), port=port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def reset(self) -> None:
        self.script = Script()
        self.requests: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.hung_up = threading.Event()
        self.no_model: str | None = None  # the error code instead
        self.key: str | None = None

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            threading.Event().wait(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self._server.should_exit = True
        self._thread.join()

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        app.include_router(page.router)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "Give the API key.")
            if self.no_model:
                return refusal(503, "No model yet.", self.no_model)
            return JSONResponse({"object": "list", "data": [{"id": "scripted"}]})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.requests.append(await request.json())
            if self.script.status != 200:
                return refusal(self.script.status, "The queue is full: try again in a moment.")
            return StreamingResponse(self._stream(self.script), media_type="text/event-stream")

        return app

    async def _stream(self, script: Script) -> AsyncIterator[str]:
        try:
            yield event(choices=[choice({"role": "assistant", "content": ""})])
            yield ": still here\n\n"
            for index, piece in enumerate(script.pieces):
                while index == script.hold and not self.go.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(script.pause)
                yield event(choices=[choice({"content": piece})])
        except asyncio.CancelledError:
            self.hung_up.set()
            raise
        if script.error:
            yield event(error={"message": script.error, "type": "server_error"})
        if not script.cut and not script.error:
            yield event(choices=[choice({}, script.finish)])
            yield event(choices=[], usage={"completion_tokens": len(script.pieces)})
            yield "data: [DONE]\n\n"


def choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"


def refusal(status: int, message: str, code: str | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "error", "code": code}}, status)


# -- what a reader does and sees -------------------------------------------------------------------


def ask(page: Page, text: str = "Hello?") -> None:
    expect(page.locator("#send")).to_be_enabled()
    page.fill("#input", text)
    page.keyboard.press("Enter")


def finished(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()


def answers(page: Page) -> Locator:
    return page.locator(".assistant .body")


def titles(page: Page) -> Locator:
    return page.locator("#conversations a")
