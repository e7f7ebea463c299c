"""Structured output: from what a request asks for to the grammar of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nybble.errors import RequestError
from nybble.grammar import Grammar
from nybble.schema import check_schema
from nybble.serve.chatfields import ResponseFormat
from nybble.serve.daemon import in_daemon
from nybble.serve.errors import busy, refused
from nybble.serve.protocol import ChatRequest
from nybble.serve.service import Service
from nybble.serve.toolcalls import ToolUse
from nybble.tools import Layout, json_arguments

COMPILE_SECONDS = 30.0


async def answer_grammar(
    body: ChatRequest, use: ToolUse | None, resumed: bool, service: Service
) -> Grammar | None:
    """What the answers to a chat must follow, None where they are free.

    Made beside the event loop. ApiError 400 for what cannot be enforced, or not in time; 429
    where those of other requests take all of the time.
    """
    wanted = body.response_format
    if wanted is not None and wanted.type == "text":
        wanted = None
    if wanted is None and (use is None or not use.enforced):
        return None
    field = "tools" if wanted is None else "response_format"

    def make() -> Grammar:
        if use is not None:
            content = None if wanted is None else _content(wanted)
            return service.grammars.structure(use.layout(resumed=resumed, content=content))
        assert wanted is not None
        strict = wanted.json_schema is not None and wanted.json_schema.strict
        return service.grammars.json_schema(_schema_of(wanted), strict)

    try:
        return await _compiled(make, service.compiling)
    except TimeoutError as error:
        raise refused(
            field,
            f"{field} took over {COMPILE_SECONDS:g} seconds to prepare: simplify the schema.",
        ) from error
    except RequestError as error:
        raise refused(field, str(error)) from error


async def _compiled(make: Callable[[], Grammar], compiling: asyncio.Semaphore) -> Grammar:
    """One at a time: a compilation cannot be broken off, so it has its turn until it ends by
    itself, whether or not anybody waits for it any more."""
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            await compiling.acquire()
    except TimeoutError as error:
        raise busy("Schemas of other requests are being prepared: try again soon.") from error
    grammar = in_daemon(make, "nybble-grammar")
    grammar.add_done_callback(lambda _: compiling.release())
    async with asyncio.timeout(COMPILE_SECONDS):
        return await asyncio.shield(grammar)


def _content(wanted: ResponseFormat) -> Layout:
    schema = _schema_of(wanted)
    check_schema(schema)
    return json_arguments(schema)


def _schema_of(wanted: ResponseFormat) -> dict[str, Any]:
    """What an answer is valid under: without a schema it is any object."""
    given = wanted.json_schema
    return {"type": "object", "additionalProperties": True} if given is None else given.json_schema
