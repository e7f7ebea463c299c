"""Puts a server under load, and clocks every answer as its client sees it.

Open loop: requests arrive at random (a Poisson process), whether or not earlier ones have been
answered, and their clocks start when they were due: so a server that falls behind cannot hide it.
Closed loop: so many clients, each of which sends its next request when it has its answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

import httpx2

from nybble.address import fits_header, is_address
from nybble.bench.workload import Job
from nybble.errors import ConfigError

Progress = Callable[[int, int], None]
"""Called with (requests that have ended, requests in all)."""


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible endpoint. url: up to and with its /v1. timeout: seconds of silence."""

    url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = False
    timeout: float = 600.0

    def body(self, job: Job) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": job.messages,
            "max_tokens": job.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | ({"ignore_eos": True} if self.ignore_eos else {})


@dataclass
class Shot:
    """What became of one request. Seconds since the load began; tokens as the server counts.

    tokens_at: when each piece of text came. error: its kind, and a text that says more.
    """

    due: float
    ended: float = 0.0
    tokens_at: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None
    detail: str = ""


# Where a delta has some of the answer; a role or the end alone is none of it.
_PARTS = ("content", "reasoning_content", "tool_calls")


class _FailedError(Exception):
    """An answer that is none: kind, detail."""


def base_url(url: str) -> str:
    """The address that ends in /v1, which may be left out where there is no other path."""
    if not is_address(url):
        raise ConfigError(f"URL is {url!r}: give one such as http://127.0.0.1:8000/v1.")
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def first_model(url: str, api_key: str | None) -> str:
    """The model that the endpoint names first."""
    try:
        answer = httpx2.get(f"{url}/models", headers=_headers(api_key), timeout=30)
    except httpx2.HTTPError as error:
        raise ConfigError(
            f"{url} does not answer ({_kind(error)}): check that the server runs, and the address."
        ) from error
    if answer.status_code != 200:
        raise ConfigError(
            f"{url}/models answered {answer.status_code} ({_said(answer.content)}): check that the "
            "address ends in /v1, and give --api-key or --model."
        )
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{url}/models names no model ({_said(answer.content)}): check that the address ends "
            "in /v1, and give --model."
        ) from error


class Load:
    """Sends jobs to a target, with the connections they need."""

    def __init__(
        self, target: Target, jobs: Sequence[Job], progress: Progress = lambda done, total: None
    ) -> None:
        self._target, self._jobs, self._progress = target, jobs, progress
        self._shots: list[Shot] = []
        self._done = 0
        self._begin = 0.0

    def open_loop(self, rate: float, random: Random) -> list[Shot]:
        """`rate` requests a second on average, at random."""
        return asyncio.run(self._run(self._arrive, rate, random))

    def closed_loop(self, clients: int) -> list[Shot]:
        """`clients` requests at a time."""
        return asyncio.run(self._run(self._clients, clients))

    async def _run(self, way: Callable[..., Any], *arguments: Any) -> list[Shot]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(
            headers=_headers(self._target.api_key), timeout=self._target.timeout, limits=limits
        ) as client:
            self._begin = time.perf_counter()
            await way(client, *arguments)
        return self._shots

    async def _arrive(self, client: httpx2.AsyncClient, rate: float, random: Random) -> None:
        due = 0.0
        async with asyncio.TaskGroup() as group:
            for job in self._jobs:
                await asyncio.sleep(due - self._now())
                group.create_task(self._send(client, job, due))
                due += random.expovariate(rate)

    async def _clients(self, client: httpx2.AsyncClient, count: int) -> None:
        jobs = iter(self._jobs)

        async def answers() -> None:
            for job in jobs:
                await self._send(client, job, self._now())

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(answers())

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    async def _send(self, client: httpx2.AsyncClient, job: Job, due: float) -> None:
        shot = Shot(due)
        self._shots.append(shot)
        try:
            await self._receive(client, job, shot)
        except _FailedError as error:
            shot.error, shot.detail = error.args
        except httpx2.HTTPError as error:
            shot.error, shot.detail = _kind(error), str(error)
        shot.ended = self._now()
        self._done += 1
        self._progress(self._done, len(self._jobs))

    async def _receive(self, client: httpx2.AsyncClient, job: Job, shot: Shot) -> None:
        url, body = f"{self._target.url}/chat/completions", self._target.body(job)
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                said = _said(await response.aread())
                raise _FailedError(f"HTTP {response.status_code}", said)
            if "text/event-stream" not in response.headers.get("content-type", ""):
                raise _FailedError("no stream", _said(await response.aread()))
            ended = False
            async for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    break
                try:
                    ended |= self._read(json.loads(event.data), shot)
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    raise _FailedError("no chunk", event.data[:300]) from error
            if not ended:
                raise _FailedError("cut off", "the stream ended without a finish_reason")
            shot.new_tokens = shot.new_tokens or len(shot.tokens_at)

    def _read(self, chunk: dict[str, Any], shot: Shot) -> bool:
        """Whether the answer ends with this chunk."""
        if "error" in chunk:
            raise _FailedError("error event", _message(chunk)[:300])
        choices = chunk["choices"]
        if any(choice["delta"].get(part) for choice in choices for part in _PARTS):
            shot.tokens_at.append(self._now())
        if usage := chunk.get("usage"):
            shot.prompt_tokens = int(usage["prompt_tokens"])
            shot.new_tokens = int(usage["completion_tokens"])
        return any(choice.get("finish_reason") for choice in choices)


def _said(body: bytes) -> str:
    """What a server says: the message of its error, or the beginning of whatever it sent."""
    text = body.decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):
        text = _message(json.loads(text))
    return " ".join(text.split())[:300] or "an empty answer"


def _message(answer: Any) -> str:
    """Of OpenAI's {"error": {"message": text}}, or of {"error": text}."""
    error = answer["error"]
    return str(error["message"] if isinstance(error, dict) and "message" in error else error)


def _kind(error: httpx2.HTTPError) -> str:
    for kind, name in (
        (httpx2.ConnectError, "no connection"),
        (httpx2.TimeoutException, "timeout"),
        (httpx2.TransportError, "cut off"),
    ):
        if isinstance(error, kind):
            return name
    return type(error).__name__


def _headers(api_key: str | None) -> dict[str, str]:
    if api_key and not fits_header(api_key):
        raise ConfigError("--api-key is no key: it has characters that no header can hold.")
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
