"""Structured output: from what a request asks for to the grammar of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nybble.errors import RequestError
from nybble.grammar import Grammar, GrammarCompiler
from nybble.schema import check_schema
from nybble.serve.chatfields import ResponseFormat
from nybble.serve.daemon import in_daemon
from nybble.serve.errors import busy, refused
from nybble.serve.protocol import ChatRequest
from nybble.serve.service import Service
from nybble.serve.toolcalls import ToolUse, any_object
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
    field = "tools" if wanted is None else "response_format"

    def make() -> Grammar | None:
        if use is None:
            return None if wanted is None else _json(wanted, service.grammars)
        layout = use.layout(resumed=resumed, content=None if wanted is None else _content(wanted))
        return None if layout is None else service.grammars.structure(layout)

    if use is None and wanted is None:
        return None
    try:
        return await _compiled(make, service.compiling)
    except TimeoutError as error:
        raise refused(
            field,
            f"{field} took over {COMPILE_SECONDS:g} seconds to prepare: simplify the schema.",
        ) from error
    except RequestError as error:
        raise refused(field, str(error)) from error


async def _compiled(
    make: Callable[[], Grammar | None], compiling: asyncio.Semaphore
) -> Grammar | None:
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


def _json(wanted: ResponseFormat, compiler: GrammarCompiler) -> Grammar:
    if wanted.json_schema is None:
        return compiler.json_object()
    return compiler.json_schema(wanted.json_schema.json_schema, wanted.json_schema.strict)


def _content(wanted: ResponseFormat) -> Layout:
    if wanted.json_schema is None:
        return any_object()
    check_schema(wanted.json_schema.json_schema)
    return json_arguments(wanted.json_schema.json_schema)
