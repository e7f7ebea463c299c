"""What tool formats have in common: tools, calls, the prompt of a chat, and a reply in pieces."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nybble.errors import RequestError

Message = Mapping[str, Any]
# A grammar as xgrammar's structural tags spell it.
Layout = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: a JSON schema; None means it takes none.

    strict: its calls are to be valid under that schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if (self.parameters or {}).get("type", "object") != "object":
            raise RequestError(
                f"The parameters of the tool {self.name!r} are no object: give a schema with "
                '"type": "object".',
                "tools",
            )

    @property
    def schema(self) -> Mapping[str, Any]:
        """What its arguments are valid under: always an object."""
        return self.parameters or {"type": "object", "properties": {}}

    @property
    def guard(self) -> Mapping[str, Any]:
        """What a call is held to that nobody has forced: its schema, if that is strict."""
        return self.schema if self.strict else {"type": "object", "additionalProperties": True}

    def described(self) -> dict[str, Any]:
        """The tool in OpenAI's form, for a chat template: what is not known is left out."""
        known = {"description": self.description, "parameters": self.parameters}
        function = {key: value for key, value in known.items() if value}
        return {"type": "function", "function": {"name": self.name, **function}}


@dataclass(frozen=True)
class ToolCall:
    """One finished call; arguments: the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolPrompt:
    """A chat in the form of a model: messages and tools for its chat template, and the beginning
    of the answer, which the model goes on with."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    reply: str = ""


# -- a reply in pieces -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class CallDelta:
    """More of call number `index`: its name, which comes first, or a piece of its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class CallEnd:
    """Call number `index` is complete; `raw` is the text that it was made of.

    sound: its arguments are a JSON object. Where they are not, `raw` is what the model said.
    """

    index: int
    raw: str
    sound: bool


Delta = TextDelta | CallDelta | CallEnd


class ToolParser(Protocol):
    """Reads one reply. The deltas do not depend on how its text is cut, but for their number."""

    @property
    def done(self) -> bool:
        """Whether nothing more belongs to the reply: the rest need not be generated."""

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """What was held back, after the last text."""


class ToolFormat(Protocol):
    """How a family of models is told of tools, and how it calls them."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a reply beside the end of the turn."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolPrompt:
        """The chat for the model; RequestError where it has no such form."""

    def parser(
        self, tools: Sequence[Tool], *, resumed: bool = False, at_most: int | None = None
    ) -> ToolParser:
        """A reader of one reply. resumed: the prompt had a `reply`; at_most: so many calls."""

    def forced(self, tools: Sequence[Tool], *, resumed: bool, many: bool) -> Layout:
        """The grammar of a reply that calls one of the tools, or several one after another."""

    def opening(self, *, resumed: bool) -> str:
        """What a reply begins with that calls no tool."""

    def guarded(self, tools: Sequence[Tool]) -> Layout:
        """The grammar of any reply whose calls are valid under the tools' schemas."""


@dataclass
class Reply:
    """A whole reply, put together from its deltas. Calls that are not sound are text."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    _name: str = ""
    _arguments: str = ""

    def add(self, delta: Delta) -> None:
        match delta:
            case TextDelta(text):
                self.content += text
            case CallDelta(_, name, arguments):
                self._name = name or self._name
                self._arguments += arguments
            case CallEnd(_, raw, sound):
                if sound:
                    self.calls.append(ToolCall(self._name, self._arguments))
                else:
                    self.content += raw
                self._name = self._arguments = ""


# -- for the formats -------------------------------------------------------------------------------


def json_arguments(schema: Mapping[str, Any]) -> Layout:
    """The part of a layout that stands for a call's arguments."""
    return {"type": "json_schema", "json_schema": schema}


def check_turns(messages: Sequence[Message]) -> None:
    """RequestError unless each call of an assistant is answered by tool messages right after it.

    Messages are in OpenAI's form: an assistant's tool_calls with their ids, and messages of the
    role "tool" that name them as tool_call_id.
    """
    open_calls: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message.get("tool_call_id") not in open_calls:
                raise RequestError(
                    f"messages[{index}] answers no open call: give the tool_call_id of a call in "
                    "the assistant's message before it.",
                    "messages",
                )
            open_calls.remove(message["tool_call_id"])
        elif open_calls:
            break
        else:
            open_calls = [call["id"] for call in message.get("tool_calls") or ()]
    if open_calls:
        raise RequestError(
            f"The call {open_calls[0]!r} has no answer: put a message of the role tool behind the "
            "assistant's.",
            "messages",
        )


def is_object(text: str) -> bool:
    """Whether `text` is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def names_of(tools: Collection[Tool]) -> frozenset[str]:
    return frozenset(tool.name for tool in tools)


def beginning_at_end(text: str, *marks: str) -> int:
    """Where the earliest unfinished mark at the end of `text` may have begun; len(text) if none."""
    longest = max(map(len, marks))
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)
