"""Structured output: from what a request asks for to the grammar of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nybble.errors import RequestError
from nybble.grammar import Grammar, GrammarCompiler
from nybble.schema import check_schema
from nybble.serve.errors import refused
from nybble.serve.protocol import ChatRequest, ResponseFormat
from nybble.serve.toolcalls import ToolUse, any_object
from nybble.tools import Layout
from nybble.tools.base import json_arguments

COMPILE_SECONDS = 30.0


async def answer_grammar(
    body: ChatRequest, use: ToolUse | None, resumed: bool, compiler: GrammarCompiler
) -> Grammar | None:
    """What the answers to a chat must follow, None where they are free.

    Compiled beside the event loop. ApiError 400 for what cannot be enforced, or not in time.
    """
    wanted = body.response_format
    if wanted is not None and wanted.type == "text":
        wanted = None
    if use is None:
        if wanted is None:
            return None
        return await _compiled("response_format", lambda: _json(wanted, compiler))
    layout = use.layout(resumed=resumed, content=None if wanted is None else _content(wanted))
    if layout is None:
        return None
    return await _compiled("tools", lambda: compiler.structure(layout))


def _json(wanted: ResponseFormat, compiler: GrammarCompiler) -> Grammar:
    if wanted.json_schema is None:
        return compiler.json_object()
    return compiler.json_schema(wanted.json_schema.json_schema, wanted.json_schema.strict)


def _content(wanted: ResponseFormat) -> Layout:
    if wanted.json_schema is None:
        return any_object()
    schema = wanted.json_schema.json_schema
    try:
        check_schema(schema)
    except RequestError as error:
        raise refused("response_format", str(error)) from error
    return json_arguments(schema)


async def _compiled(field: str, compile_it: Callable[[], Grammar]) -> Grammar:
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            return await asyncio.to_thread(compile_it)
    except TimeoutError as error:
        raise refused(
            field,
            f"{field} took over {COMPILE_SECONDS:g} seconds to prepare: simplify the schema.",
        ) from error
    except RequestError as error:
        raise refused(field, str(error)) from error
