"""`nybble serve`: the OpenAI-compatible server and its chat page."""

from __future__ import annotations

import logging
import os
import re
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import console
from nybble.cli.options import Running
from nybble.errors import ConfigError
from nybble.paths import local_folder

_GPU_STEP = 2048

if TYPE_CHECKING:
    from nybble.llm import LLM
    from nybble.serve.settings import ServerSettings


@dataclass(frozen=True)
class Batching(Running):
    """Settings of LLM that a server has use for."""

    max_running: Annotated[int, typer.Option(help="Requests that run at a time.")] = 64
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="Most tokens in one step: 512 on a CPU, 2048 on a GPU.", show_default=False
        ),
    ] = None
    cache_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens that the cache holds for all requests.", show_default=False),
    ] = None


@dataclass(frozen=True)
class Listening:
    """Settings of ServerSettings."""

    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="NYBBLE_API_KEY",
            help="What clients must send; better in the environment, where ps does not show it.",
            show_default=False,
        ),
    ] = None
    allow_public: Annotated[
        bool, typer.Option("--allow-public", help="Listen on a public address without a key.")
    ] = False
    served_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; may be repeated.", show_default=False),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A web origin whose pages may call; may be repeated.", show_default=False
        ),
    ] = None
    max_waiting: Annotated[int, typer.Option(help="Requests that may queue; then 429.")] = 256
    max_body: Annotated[int, typer.Option(help="Largest request, in bytes.")] = 2 * 2**20
    request_seconds: Annotated[float, typer.Option(help="Time limit of one request.")] = 600.0
    drain_seconds: Annotated[
        float, typer.Option(help="Time for running answers to finish after SIGTERM.")
    ] = 30.0

    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write what people ask to the log: tell them.")
    ] = False

    def settings(self, model: str) -> ServerSettings:
        from nybble.serve.settings import ServerSettings

        return ServerSettings(
            names=tuple(self.served_name or [_name(model)]),
            host=self.host,
            port=self.port,
            api_key=self.api_key,
            allow_public=self.allow_public,
            cors_origins=tuple(map(_origin, self.cors_origin or ())),
            max_waiting=self.max_waiting,
            max_body=self.max_body,
            request_seconds=self.request_seconds,
            drain_seconds=self.drain_seconds,
            log_prompts=self.log_prompts,
        )


def run(model: str, running: Batching, listening: Listening, open_page: bool, quiet: bool) -> None:
    try:
        from nybble.serve import server
    except ImportError as error:
        raise ConfigError(
            f"The server needs the package {error.name}: run `pip install '.[serve]'` in "
            "nybble's folder."
        ) from error
    settings = listening.settings(model)
    if quiet and settings.log_prompts:
        raise ConfigError("--log-prompts writes to the log that --quiet leaves out: choose one.")

    def announce(url: str) -> None:
        console.note(f"{settings.names[0]} at {url} (API: {url}v1). Ctrl-C stops.")
        if open_page and _has_desktop():
            webbrowser.open(url)

    with nullcontext() if quiet else _log_of_requests():
        server.run(lambda: _load(model, running, quiet), settings, announce)


def _origin(text: str) -> str:
    """An origin as browsers write it: anything else would never be equal to one."""
    if text not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", text):
        raise ConfigError(
            f"--cors-origin is {text!r}: give scheme and host without a path, as in "
            "https://example.org, or * for all."
        )
    return text


def _load(model: str, running: Batching, quiet: bool) -> LLM:
    from nybble.cli.loading import load
    from nybble.kernels.device import find_device

    if running.prefill_chunk is None and find_device(running.device).type == "cuda":
        # Who waits for the next token waits for other people's prompts, a step at a time.
        running = replace(running, prefill_chunk=_GPU_STEP)
    return load(model, running, quiet, fill_memory=True)


def _name(model: str) -> str:
    """What clients call a model: a folder by its own name, without where it stands."""
    folder = local_folder(model)
    return model if folder is None else folder.resolve().name


def _has_desktop() -> bool:
    """Whether a browser has a screen: without one, a text browser would take the terminal."""
    return sys.platform != "linux" or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


@contextmanager
def _log_of_requests() -> Iterator[None]:
    """A line for each request on stderr; not a word of what was said, unless by --log-prompts."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("nybble.serve", "uvicorn.error")]
    for logger, level in zip(loggers, (logging.INFO, logging.WARNING), strict=True):
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
