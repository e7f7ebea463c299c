"""Tool use as the first generation of Qwen chat models was trained on it: ReAct (Yao et al. 2022).

The tools stand in the user's message. The model answers with a thought and either a final answer
or an action and its input, after which it waits for an observation. The words are those of Qwen's
own openai_api.py (QwenLM/Qwen, Apache-2.0); models know them by heart, so not one may change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from nybble.errors import RequestError
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

THOUGHT, ACTION, ACTION_INPUT = "Thought:", "\nAction:", "\nAction Input:"
OBSERVATION, FINAL_ANSWER = "\nObservation:", "\nFinal Answer:"

_TOOL = (
    "{name}: Call this tool to interact with the {name} API. "
    "What is the {name} API useful for? {description} Parameters: {parameters}"
)
_INSTRUCTION = """\
Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {question}"""
_KNOWN = "I now know the final answer."
# The name with the space around it: to strip that here as well would try every split of it.
_HEAD = re.compile(r"(?P<name>[^\n]*)\nAction Input:\s*(?=\{)")
# What a forced call may think before it acts: one line.
_MOST_THOUGHT = 300


class ReActFormat:
    """Tools in the user's message, one call a reply."""

    stop: tuple[str, ...] = (OBSERVATION,)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolPrompt:
        check_turns(messages)
        turns: list[_Turn] = []
        for message in _one_call_each(messages):
            _add_turn(turns, message, bool(tools))
        chat = [{"role": role, "content": "".join(said)} for role, said in turns]
        if tools:
            _put_instruction(chat, tools)
        if messages[-1]["role"] != "tool":
            return ToolPrompt(chat)
        return ToolPrompt(chat[:-1], reply=f"{chat[-1]['content']}\n{THOUGHT}")

    def parser(
        self, tools: Sequence[Tool], *, resumed: bool = False, at_most: int | None = None
    ) -> ToolParser:
        return ReActParser(names_of(tools), resumed)

    def forced(self, tools: Sequence[Tool], *, resumed: bool, many: bool) -> Layout:
        opening = _text("" if resumed else THOUGHT)
        thought = {"type": "regex", "pattern": f" [^\\n]{{1,{_MOST_THOUGHT}}}"}
        calls = [_sequence(_text(_begin(t)), json_arguments(t.schema)) for t in tools]
        return _sequence(opening, thought, {"type": "or", "elements": calls})

    def opening(self, *, resumed: bool) -> str:
        words = f" {_KNOWN}{FINAL_ANSWER} "
        return words if resumed else THOUGHT + words

    def guarded(self, tools: Sequence[Tool]) -> Layout:
        return {
            "type": "triggered_tags",
            "triggers": [ACTION],
            "tags": [
                {"type": "tag", "begin": _begin(t), "content": json_arguments(t.guard), "end": ""}
                for t in tools
            ],
            "stop_after_first": True,
        }


def _begin(tool: Tool) -> str:
    return f"{ACTION} {tool.name}{ACTION_INPUT} "


def _text(value: str) -> Layout:
    return {"type": "const_string", "value": value}


def _sequence(*elements: Layout) -> Layout:
    return {"type": "sequence", "elements": list(elements)}


# -- the prompt ------------------------------------------------------------------------------------

_Turn = tuple[str, list[str]]  # its role, and its text in pieces


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """The same chat with calls that were made together told one after another."""
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        answers = list(messages[index + 1 : index + 1 + len(calls)])
        for number, call in enumerate(calls):
            content = "" if number else message["content"]
            yield {"role": "assistant", "content": content, "call": call["function"]}
            ids = [answer["tool_call_id"] for answer in answers]
            yield answers.pop(ids.index(call["id"]))
        if not calls and message["role"] != "tool":
            yield message


def _add_turn(turns: list[_Turn], message: Message, tools: bool) -> None:
    role, content = message["role"], (message["content"] or "").lstrip("\n").rstrip()
    if role == "tool":
        turns[-1][1].append(f"{OBSERVATION} {content}")
        return
    if role == "assistant" and (tools or "call" in message):
        content = _spoken(content, message.get("call"))
    if role == "assistant" and turns and turns[-1][0] == "assistant":
        turns[-1][1].append(f"\n{content}")
    else:
        turns.append((role, [content]))


def _spoken(content: str, call: dict[str, str] | None) -> str:
    """What the model said, in the words of the format."""
    if call is None:
        return f"{THOUGHT} {_KNOWN}{FINAL_ANSWER} {content}"
    thought = content if content.startswith(THOUGHT) else f"{THOUGHT} {content}"
    return f"{thought}{ACTION} {call['name']}{ACTION_INPUT} {call['arguments']}"


def _put_instruction(chat: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> None:
    """Into the last thing that the user said."""
    asked = next((turn for turn in reversed(chat) if turn["role"] == "user"), None)
    if asked is None:
        raise RequestError("Tools need a question: add a message of the user.", "messages")
    asked["content"] = _INSTRUCTION.format(
        tools="\n\n".join(map(_describe, tools)),
        names=", ".join(tool.name for tool in tools),
        question=asked["content"],
    )


def _describe(tool: Tool) -> str:
    parameters = json.dumps(tool.schema, ensure_ascii=False)
    return _TOOL.format(name=tool.name, description=tool.description, parameters=parameters)


# -- the reply -------------------------------------------------------------------------------------


class ReActParser:
    """A thought is held back until it is clear what follows: with an action it is the content,
    before a final answer it is not, for nobody but the model needs "I now know the final answer".

    An answer that does not begin with a thought is passed on as it comes, up to an action. What
    is no call of an offered tool with a JSON object as its input stays text.
    """

    def __init__(self, names: frozenset[str], resumed: bool = False) -> None:
        self._names = names
        self._buffer = ""
        self._step = self._in_thought if resumed else self._at_start
        self._call: OpenCall | None = None
        self._thought = ""
        self._action = ""  # how an action was opened whose name is not known yet
        self.done = False

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
        if self.done:
            return []
        self.done = True
        if self._call is not None:
            self._call.note(self._buffer)
            return [self._call.end()]
        rest = self._thought + self._action + self._buffer
        if self._step == self._in_thought:
            rest = rest.strip()
        return [TextDelta(rest)] if rest else []

    def _at_start(self) -> list[Delta] | None:
        begun = self._buffer.lstrip()
        action, final = ACTION.strip(), FINAL_ANSWER.strip()
        if begun.startswith(THOUGHT):
            self._step = self._in_thought
        elif begun.startswith(final):
            self._step = self._in_final
        elif begun.startswith(action):
            self._action, self._step = action, self._in_action
        elif any(mark.startswith(begun) for mark in (THOUGHT, action, final)):
            return None
        else:
            self._step = self._in_text
            return []
        self._buffer = begun.partition(":")[2]
        return []

    def _in_thought(self) -> list[Delta] | None:
        found = [(self._buffer.find(m), m) for m in (ACTION, FINAL_ANSWER) if m in self._buffer]
        if not found:
            return None
        start, mark = min(found)
        thought, self._buffer = self._buffer[:start], self._buffer[start + len(mark) :]
        if mark == FINAL_ANSWER:
            self._step = self._in_final
        else:
            self._thought, self._action = thought.strip(), ACTION
            self._step = self._in_action
        return []

    def _in_final(self) -> list[Delta] | None:
        """Everything from here on is the answer, but for the space before it."""
        text = self._buffer.lstrip()
        if not text:
            return None
        self._buffer, self._step = text, self._in_answer
        return []

    def _in_answer(self) -> list[Delta] | None:
        text, self._buffer = self._buffer, ""
        return [TextDelta(text)] if text else None

    def _in_text(self) -> list[Delta] | None:
        text, mark, after = self._buffer.partition(ACTION)
        if mark:
            self._buffer, self._action, self._step = after, mark, self._in_action
        else:
            end = beginning_at_end(text, ACTION)
            text, self._buffer = text[:end], text[end:]
        return [TextDelta(text)] if text else [] if mark else None

    def _in_action(self) -> list[Delta] | None:
        head = _HEAD.match(self._buffer)
        if head is None:
            return None if self._may_be_head() else self._no_action()
        name = head["name"].strip(" \t")
        if name not in self._names:
            return self._no_action()
        thought = [TextDelta(self._thought)] if self._thought else []
        self._call = OpenCall(0, f"{self._action}{head[0]}")
        self._thought, self._action, self._step = "", "", self._in_arguments
        self._buffer = self._buffer[head.end() :]
        return [*thought, CallDelta(0, name)]

    def _may_be_head(self) -> bool:
        _, newline, rest = self._buffer.partition("\n")
        mark = ACTION_INPUT.removeprefix("\n")
        return not newline or mark.startswith(rest) or not rest.removeprefix(mark).strip()

    def _no_action(self) -> list[Delta]:
        text = self._thought + self._action
        self._thought, self._action, self._step = "", "", self._in_text
        return [TextDelta(text)]

    def _in_arguments(self) -> list[Delta] | None:
        assert self._call is not None
        piece, self._buffer = self._call.push(self._buffer)
        deltas: list[Delta] = [CallDelta(0, None, piece)] if piece else []
        if self._call.closed and not self._call.broken:
            deltas += self.finish()
        return deltas or None
