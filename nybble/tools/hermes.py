"""Tool calls as Qwen2.5 and Qwen3 write them, whose chat templates describe the tools themselves:

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>

The form is that of Nous Research's Hermes models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.tools.base import (
    CallDelta,
    Delta,
    Layout,
    Message,
    TextDelta,
    Tool,
    ToolParser,
    ToolPrompt,
    beginning_at_end,
    check_turns,
    json_arguments,
    names_of,
)
from nybble.tools.opencall import OpenCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)'
)
# What closes a call behind its arguments: models forget the tag, and write a brace too many.
_TAIL = re.compile(rf"\s*\}}[\s}}]*({CLOSE})?")


class HermesFormat:
    """Tools in the chat template, calls in tags."""

    stop: tuple[str, ...] = ()

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolPrompt:
        check_turns(messages)
        described = [tool.described() for tool in tools]
        return ToolPrompt([_for_template(message) for message in messages], described or None)

    def parser(
        self, tools: Sequence[Tool], *, resumed: bool = False, at_most: int | None = None
    ) -> ToolParser:
        return HermesParser(names_of(tools), at_most)

    def forced(self, tools: Sequence[Tool], *, resumed: bool, many: bool) -> Layout:
        return {
            "type": "tags_with_separator",
            "tags": [_tag(tool, tool.schema) for tool in tools],
            "separator": "\n",
            "at_least_one": True,
            "stop_after_first": not many,
        }

    def opening(self, *, resumed: bool) -> str:
        return ""

    def guarded(self, tools: Sequence[Tool]) -> Layout:
        return {
            "type": "triggered_tags",
            "triggers": [OPEN],
            "tags": [_tag(tool, tool.guard) for tool in tools],
        }


def _tag(tool: Tool, schema: Mapping[str, Any]) -> Layout:
    return {
        "type": "tag",
        "begin": f'{OPEN}\n{{"name": {json.dumps(tool.name)}, "arguments": ',
        "content": json_arguments(schema),
        "end": f"}}\n{CLOSE}",
    }


def _for_template(message: Message) -> dict[str, Any]:
    """Arguments as data: templates write them as JSON again."""
    calls = message.get("tool_calls")
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    functions = [call["function"] for call in calls]
    data = [{**f, "arguments": _data_of(f["arguments"])} for f in functions]
    whole = [{**call, "function": f} for call, f in zip(calls, data, strict=True)]
    return {**message, "tool_calls": whole}


def _data_of(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


class HermesParser:
    """Text up to <tool_call>, then a call, and so on.

    What is no call of an offered tool stays text, tags and all. White space beside calls goes.
    """

    def __init__(self, names: frozenset[str], at_most: int | None = None) -> None:
        self._names = names
        self._at_most = at_most
        self._calls = 0
        self._sound = False  # whether any of them was one
        self._buffer = ""
        self._gap: str | None = None  # inside a tag whose call has no name yet: what stood before
        self._call: OpenCall | None = None

    @property
    def done(self) -> bool:
        return self._call is None and self._calls == self._at_most

    def push(self, text: str) -> list[Delta]:
        self._buffer += text
        deltas: list[Delta] = []
        while not self.done:
            more = self._step()
            if more is None:
                break
            deltas += more
        return deltas

    def finish(self) -> list[Delta]:
        rest, self._buffer = self._buffer, ""
        if self.done:
            return []
        if self._call is not None:
            return self._end_call(self._call, rest)
        if self._gap is not None:
            return self._whole_call(rest, "")
        return [TextDelta(rest)] if rest and not (self._sound and rest.isspace()) else []

    def _step(self) -> list[Delta] | None:
        """What the buffer says next; None: it must grow first."""
        if self._call is not None:
            return self._in_arguments(self._call)
        return self._in_text() if self._gap is None else self._in_tag()

    def _in_text(self) -> list[Delta] | None:
        before, tag, after = self._buffer.partition(OPEN)
        end = len(before) if tag else beginning_at_end(self._buffer, OPEN)
        shown = self._buffer[:end].rstrip()
        if tag:
            self._gap, self._buffer = before[len(shown) :], after
        else:
            self._buffer = self._buffer[len(shown) :]
        if not shown:
            return [] if tag else None
        return [TextDelta(shown)]

    def _in_tag(self) -> list[Delta] | None:
        head = _HEAD.match(self._buffer)
        name = _text_of(head["name"]) if head else None
        if head and name in self._names:
            self._call = OpenCall(self._calls, f"{self._gap}{OPEN}{head[0]}")
            self._calls, self._gap = self._calls + 1, None
            self._buffer = self._buffer[head.end() :]
            return [CallDelta(self._call.index, name)]
        body, tag, after = self._buffer.partition(CLOSE)
        if not tag:
            return None
        self._buffer = after
        return self._whole_call(body, tag)

    def _whole_call(self, body: str, tag: str) -> list[Delta]:
        """A call that is not in the usual order of things, or no call."""
        raw = f"{self._gap}{OPEN}{body}{tag}"
        self._gap = None
        name, arguments = _read_call(body)
        if name not in self._names:
            return [TextDelta(raw)]
        call = OpenCall(self._calls, raw)
        call.push(arguments)
        self._calls += 1
        whole = CallDelta(call.index, None, arguments)
        return [CallDelta(call.index, name), whole, *self._end_call(call, "")]

    def _in_arguments(self, call: OpenCall) -> list[Delta] | None:
        if not call.closed:
            piece, self._buffer = call.push(self._buffer)
            return [CallDelta(call.index, None, piece)] if piece else None
        end = self._end_of_call(call)
        if end is None:
            return None
        rest, self._buffer = self._buffer[:end], self._buffer[end:]
        return self._end_call(call, rest)

    def _end_of_call(self, call: OpenCall) -> int | None:
        """Where a call ends whose arguments have; None: the buffer must grow first."""
        tail = _TAIL.match(self._buffer)
        if call.broken or (tail is None and not self._buffer.isspace()):
            # More than arguments, or not even those: the tag alone tells.
            found = self._buffer.find(CLOSE)
            return None if found < 0 else found + len(CLOSE)
        if tail is None or (tail[1] is None and CLOSE.startswith(self._buffer[tail.end() :])):
            return None
        return tail.end()

    def _end_call(self, call: OpenCall, rest: str) -> list[Delta]:
        call.note(rest)
        self._call = None
        end = call.end()
        self._sound = self._sound or end.sound
        return [end]


def _text_of(literal: str) -> str | None:
    try:
        return str(json.loads(literal))
    except ValueError:
        return None


def _read_call(body: str) -> tuple[str | None, str]:
    """(name, arguments) of a call that is complete; no name where it is none."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None, ""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None, ""
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None, ""
    return call["name"], json.dumps(arguments, ensure_ascii=False)
