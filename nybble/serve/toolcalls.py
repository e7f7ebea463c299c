"""Tools in a chat request: what the model is told, what it may write, what the client gets."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from nybble.errors import RequestError
from nybble.schema import Budget, check_schema
from nybble.serve.chatfields import ChatMessage, FunctionTool, NamedFunction, NamedTool
from nybble.serve.errors import refused
from nybble.serve.protocol import ChatRequest
from nybble.serve.responses import Call, Delta, Function, FunctionDelta, Message, ToolCallDelta
from nybble.tokenizer import Tokenizer
from nybble.tools import (
    CallDelta,
    HermesFormat,
    Layout,
    ReActFormat,
    Reply,
    TextDelta,
    Tool,
    ToolFormat,
    ToolParser,
    ToolPrompt,
)


def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """The later families' chat templates say how to call tools. Without that, it takes plain
    words: those that the first generation was trained on."""
    template = tokenizer.chat_template
    return HermesFormat() if template and "<tool_call>" in template else ReActFormat()


class ToolUse:
    """How one request uses tools. tools: those that may be called; none where it says so.

    forced: those of which one must be called.
    """

    def __init__(self, body: ChatRequest, tool_format: ToolFormat) -> None:
        self.format = tool_format
        self.legacy = body.functions is not None
        choice = body.function_call if self.legacy else body.tool_choice
        offered = _offered(body)
        self.tools = [] if choice == "none" else offered
        self.forced = _forced(choice, offered, "function_call" if self.legacy else "tool_choice")
        named = isinstance(choice, (NamedTool, NamedFunction))
        self._many = not (self.legacy or named or body.parallel_tool_calls is False)

    @property
    def stop(self) -> tuple[str, ...]:
        return self.format.stop

    @property
    def enforced(self) -> bool:
        """Whether calls must be made, or made by a schema."""
        return bool(self.forced) or any(tool.strict for tool in self.tools)

    def layout(self, *, resumed: bool, content: Layout | None) -> Layout:
        """What a reply must look like.

        content: what its text must look like where it calls no tool.
        """
        if self.forced:
            _check_schemas(self.forced)
            return self.format.forced(self.forced, resumed=resumed, many=self._many)
        if content is not None:
            opening = {"type": "const_string", "value": self.format.opening(resumed=resumed)}
            answer = {"type": "sequence", "elements": [opening, content]}
            if not self.tools:
                return answer
            _check_schemas(self.tools)
            calls = self.format.forced(self.tools, resumed=resumed, many=self._many)
            return {"type": "or", "elements": [answer, calls]}
        _check_schemas(tool for tool in self.tools if tool.strict)
        return self.format.guarded(self.tools)

    def speech(self, *, resumed: bool) -> Speech:
        """A reader for one choice."""
        at_most = None if self._many else 1
        parser = self.format.parser(self.tools, resumed=resumed, at_most=at_most)
        return Speech(parser, legacy=self.legacy)


def tool_use(body: ChatRequest, tokenizer: Tokenizer) -> ToolUse | None:
    """None where the chat has nothing to do with tools: none may be called, and none was."""
    use = ToolUse(body, tool_format(tokenizer))
    return use if use.tools or _told(body.messages) else None


def chat_prompt(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], tokenizer: Tokenizer
) -> ToolPrompt:
    """A chat as its model is told it, with its calls and their answers where it has some."""
    chat = [message.as_prompt() for message in messages]
    if tools or _told(messages):
        return tool_format(tokenizer).prompt(chat, tools)
    return ToolPrompt(chat)


def _told(messages: Sequence[ChatMessage]) -> bool:
    """Whether a chat has calls in it, or answers to some."""
    return any(message.calls or message.role == "tool" for message in messages)


def _offered(body: ChatRequest) -> list[Tool]:
    functions = body.functions or [tool.function for tool in body.tools or ()]
    field = "functions" if body.functions else "tools"
    tools = [_tool(function, field) for function in functions]
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise refused(field, f"{field} has two of the name {name!r}: rename one.")
    return tools


def _tool(function: FunctionTool, field: str) -> Tool:
    try:
        return Tool(function.name, function.description, function.parameters, function.strict)
    except RequestError as error:
        raise refused(field, str(error)) from error


def _forced(
    choice: str | NamedTool | NamedFunction | None, offered: Iterable[Tool], field: str
) -> list[Tool]:
    match choice:
        case "required":
            return list(offered)
        case NamedTool() | NamedFunction():
            name = choice.function.name if isinstance(choice, NamedTool) else choice.name
            named = [tool for tool in offered if tool.name == name]
            if not named:
                raise refused(field, f"{field} names {name!r}, which is not offered: offer it.")
            return named
    return []


def _check_schemas(tools: Iterable[Tool]) -> None:
    budget = Budget()
    for tool in tools:
        try:
            check_schema(tool.schema, budget)
        except RequestError as error:
            raise refused("tools", f"The tool {tool.name!r}: {error}") from error


class Speech:
    """What one choice says, as OpenAI's objects: deltas while it comes, a message at its end."""

    def __init__(self, parser: ToolParser | None = None, *, legacy: bool = False) -> None:
        self._parser = parser
        self._legacy = legacy
        self._reply = Reply()
        self._called = False

    @property
    def done(self) -> bool:
        """Whether it has said all that is wanted of it."""
        return self._parser is not None and self._parser.done

    def hear(self, text: str, *, last: bool) -> list[Delta]:
        """The next of its text."""
        if self._parser is None:
            self._reply.content += text
            return [Delta(content=text)] if text else []
        news = self._parser.push(text) if text else []
        if last:
            news += self._parser.finish()
        for delta in news:
            self._reply.add(delta)
        return [self._shown(d) for d in news if isinstance(d, (TextDelta, CallDelta))]

    def _shown(self, delta: TextDelta | CallDelta) -> Delta:
        if isinstance(delta, TextDelta):
            return Delta(content=delta.text)
        self._called = True
        function = FunctionDelta(name=delta.name, arguments=delta.arguments)
        if self._legacy:
            return Delta(function_call=function)
        call = ToolCallDelta(index=delta.index, function=function)
        if delta.name is not None:
            call.id, call.type = _new_call_id(), "function"
        return Delta(tool_calls=[call])

    def message(self) -> Message:
        reply = self._reply
        functions = [Function(name=c.name, arguments=c.arguments) for c in reply.calls]
        if not functions:
            return Message(content=reply.content)
        content = reply.content if reply.content.strip() else None
        if self._legacy:
            return Message(content=content, function_call=functions[0])
        calls = [Call(id=_new_call_id(), function=function) for function in functions]
        return Message(content=content, tool_calls=calls)

    def reason(self, reason: str, *, streamed: bool) -> str:
        """Why it ended, in OpenAI's words. A stream has shown calls that came to nothing, too."""
        called = self._called if streamed else bool(self._reply.calls)
        if reason != "stop" or not called:
            return reason
        return "function_call" if self._legacy else "tool_calls"


def _new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
