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
from nybble.tools import json_arguments

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

    try:
        # What is refused at once does not wait for its turn.
        return await _compiled(_maker(wanted, use, resumed, service), service.compiling)
    except TimeoutError as error:
        raise refused(
            field,
            f"{field} took over {COMPILE_SECONDS:g} seconds to prepare: simplify the schema.",
        ) from error
    except RequestError as error:
        raise refused(field, str(error)) from error


def _maker(
    wanted: ResponseFormat | None, use: ToolUse | None, resumed: bool, service: Service
) -> Callable[[], Grammar]:
    """What compiles the grammar; RequestError for a schema that is refused."""
    schema = None if wanted is None else _schema_of(wanted)
    if use is not None:
        content = None
        if schema is not None:
            check_schema(schema)
            content = json_arguments(schema)
        layout = use.layout(resumed=resumed, content=content)
        return lambda: service.grammars.structure(layout)
    assert wanted is not None
    assert schema is not None
    check_schema(schema)
    strict = wanted.json_schema is not None and wanted.json_schema.strict
    return lambda: service.grammars.json_schema(schema, strict)


async def _compiled(make: Callable[[], Grammar], compiling: asyncio.Semaphore) -> Grammar:
    """One at a time: a compilation cannot be broken off, so it has its turn until it ends by
    itself, whether or not anybody waits for it any more."""
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            await compiling.acquire()
    except TimeoutError as error:
        raise busy("Schemas of other requests are being prepared: try again soon.") from error
    try:
        grammar = in_daemon(make, "nybble-grammar")
    except BaseException:  # no thread could be started, which would release it
        compiling.release()
        raise
    grammar.add_done_callback(lambda done: _ended(done, compiling))
    async with asyncio.timeout(COMPILE_SECONDS):
        return await asyncio.shield(grammar)


def _ended(grammar: asyncio.Future[Grammar], compiling: asyncio.Semaphore) -> None:
    compiling.release()
    grammar.exception()  # looked at here, for its request may be gone


def _schema_of(wanted: ResponseFormat) -> dict[str, Any]:
    """What an answer is valid under: without a schema it is any object."""
    given = wanted.json_schema
    return {"type": "object", "additionalProperties": True} if given is None else given.json_schema
