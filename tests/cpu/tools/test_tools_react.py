"""ReAct: the prompt word by word as the first generation knows it, and replies in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replies import calls_of, read, streamed

from nybble.errors import RequestError
from nybble.tools import ReActFormat, Tool

WEATHER = Tool("get_weather", "Weather of a city.", {"type": "object", "properties": {"城市": {}}})
TIME = Tool("get_time")
# As QwenLM/Qwen's openai_api.py writes it for these two functions.
INSTRUCTION = """\
Answer the following questions as best you can. You have access to the following APIs:

get_weather: Call this tool to interact with the get_weather API. What is the get_weather API \
useful for? Weather of a city. Parameters: {"type": "object", "properties": {"城市": {}}}

get_time: Call this tool to interact with the get_time API. What is the get_time API useful for?  \
Parameters: {"type": "object", "properties": {}}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [get_weather, get_time]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: """


def user(text):
    return {"role": "user", "content": text}


def assistant(text, *calls):
    functions = [
        {"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in calls
    ]
    return {"role": "assistant", "content": text, **({"tool_calls": functions} if calls else {})}


def tool(identity, text):
    return {"role": "tool", "tool_call_id": identity, "content": text}


def prompt(*messages, tools=(WEATHER, TIME)):
    return ReActFormat().prompt(messages, tools)


def test_a_question():
    system = {"role": "system", "content": "Be brief."}
    result = prompt(system, user("\nHow is Paris? \n"))
    assert result.messages == [system, user(INSTRUCTION + "How is Paris?")]
    assert (result.tools, result.reply) == (None, "")


def test_an_observation_is_gone_on_from():
    call = ("1", "get_weather", '{"城市": "巴黎"}')
    result = prompt(user("Paris?"), assistant("I look it up.", call), tool("1", "sunny\n"))
    assert result.messages == [user(INSTRUCTION + "Paris?")]
    assert result.reply == (
        'Thought: I look it up.\nAction: get_weather\nAction Input: {"城市": "巴黎"}\n'
        "Observation: sunny\nThought:"
    )


def test_a_long_conversation():
    call, more = ("1", "get_time", "{}"), ("2", "get_weather", "{}")
    result = prompt(
        user("Time?"),
        assistant(None, call),
        tool("1", "noon"),
        assistant("It is noon."),
        user("And the weather?"),
        assistant("", more),
        tool("2", "rain"),
        assistant("Rain."),
        user("Thanks!"),
    )
    assert result.messages == [
        user("Time?"),
        assistant(
            "Thought: \nAction: get_time\nAction Input: {}\nObservation: noon\n"
            "Thought: I now know the final answer.\nFinal Answer: It is noon."
        ),
        user("And the weather?"),
        assistant(
            "Thought: \nAction: get_weather\nAction Input: {}\nObservation: rain\n"
            "Thought: I now know the final answer.\nFinal Answer: Rain."
        ),
        user(INSTRUCTION + "Thanks!"),
    ]


def test_calls_made_together_are_told_one_after_another():
    calls = ("1", "get_time", "{}"), ("2", "get_weather", "{}")
    result = prompt(user("Both?"), assistant("Two.", *calls), tool("2", "rain"), tool("1", "noon"))
    assert result.reply == (
        "Thought: Two.\nAction: get_time\nAction Input: {}\nObservation: noon\n"
        "Thought: \nAction: get_weather\nAction Input: {}\nObservation: rain\nThought:"
    )


def test_ids_may_come_again():
    calls = ("1", "get_time", "{}"), ("1", "get_weather", "{}")
    chat = [user("?"), assistant("", *calls), tool("1", "noon"), tool("1", "rain")]
    reply = prompt(*chat, *chat).reply
    assert reply.index("Observation: noon") < reply.index("Observation: rain")


def test_without_tools_the_chat_is_what_it_was_but_calls_stay():
    chat = [user("Hi"), assistant("Hello."), user("Bye")]
    assert prompt(*chat, tools=()).messages == chat
    call = ("1", "get_time", "{}")
    result = prompt(user("Time?"), assistant("", call), tool("1", "noon"), tools=())
    assert result.messages == [user("Time?")]
    assert "Action: get_time" in result.reply


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("?"), tool("1", "x")], r"messages\[1\] answers no open call"),
        ([user("?"), assistant("", ("1", "f", "{}")), tool("2", "x")], r"messages\[2\] answers"),
        ([user("?"), assistant("", ("1", "f", "{}")), user("so?")], "'1' has no answer"),
        ([user("?"), assistant("", ("1", "f", "{}"))], "'1' has no answer"),
        ([{"role": "system", "content": "x"}], "add a message of the user"),
    ],
)
def test_chats_that_have_no_such_form(messages, reason):
    with pytest.raises(RequestError, match=reason):
        prompt(*messages)


# -- replies ---------------------------------------------------------------------------------------

CALL = 'Action: get_weather\nAction Input: {"city": "Paris", "days": [1, 2]}'
ARGUMENTS = '{"city": "Paris", "days": [1, 2]}'


def parser(resumed=False):
    return ReActFormat().parser([WEATHER, TIME], resumed=resumed)


REPLIES = {
    "a final answer loses its scaffold": (
        "Thought: I now know the final answer.\nFinal Answer: It rains.\nOften.",
        "It rains.\nOften.",
        [],
    ),
    "the thought before a call is the content": (
        f"Thought: I look it up.\n{CALL}",
        "I look it up.",
        [("get_weather", ARGUMENTS)],
    ),
    "what stands behind a call is not asked for": (
        f"Thought: So.\n{CALL}\nObservation: made up\nThought: more\n{CALL}",
        "So.",
        [("get_weather", ARGUMENTS)],
    ),
    "a call without a thought": (CALL, "", [("get_weather", ARGUMENTS)]),
    "a plain answer": (" Hello\n\nthere. ", " Hello\n\nthere. ", []),
    "a plain answer, then a call": (f"Sure.\n{CALL}", "Sure.", [("get_weather", ARGUMENTS)]),
    "a thought and nothing else": ("Thought: I just say hi.", "I just say hi.", []),
    "a tool that was not offered": (
        "Thought: Hm.\nAction: rm\nAction Input: {}",
        "Hm.\nAction: rm\nAction Input: {}",
        [],
    ),
    "an input that is no object": (
        "Thought: Hm.\nAction: get_time\nAction Input: now",
        "Hm.\nAction: get_time\nAction Input: now",
        [],
    ),
    "an input in Python": (
        "Action: get_time\nAction Input: {'a': 1}\nso",
        "Action: get_time\nAction Input: {'a': 1}\nso",
        [],
    ),
    "an input that was cut": (
        'Action: get_time\nAction Input: {"a": 1, "b"',
        'Action: get_time\nAction Input: {"a": 1, "b"',
        [],
    ),
    "an action without an input": ("Thought: Hm.\nAction: get_time", "Hm.\nAction: get_time", []),
    "prose about actions": (
        "Do this.\nAction: stand up\nThen sit.",
        "Do this.\nAction: stand up\nThen sit.",
        [],
    ),
    "a call after prose about actions": (
        f"Do this.\nAction: stand up\nThen sit.\n{CALL}",
        "Do this.\nAction: stand up\nThen sit.",
        [("get_weather", ARGUMENTS)],
    ),
    "braces and quotes inside a string": (
        'Action: get_time\nAction Input: {"a": "}\\"{", "b": {}} rest',
        "",
        [("get_time", '{"a": "}\\"{", "b": {}}')],
    ),
    "space around a name": (
        "Action: \t get_time \t\nAction Input:\n\n {}",
        "",
        [("get_time", "{}")],
    ),
    # With a pattern that tries every split, the space would take longer than the universe has.
    "an action of nothing but space": (f"Action:{' ' * 20_000}", f"Action:{' ' * 20_000}", []),
    "a final answer at once": ("Final Answer: 42", "42", []),
    "nothing": ("", "", []),
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies(name):
    text, content, calls = REPLIES[name]
    reply, _ = read(parser(), [text])
    assert reply.content == content
    assert calls_of(reply) == calls


def test_a_resumed_reply_begins_inside_a_thought():
    reply, _ = read(parser(resumed=True), [" I now know the final answer\nFinal Answer: sunny"])
    assert reply.content == "sunny"
    reply, _ = read(parser(resumed=True), [f" Once more.\n{CALL}"])
    assert (reply.content, len(reply.calls)) == ("Once more.", 1)
    reply, _ = read(parser(resumed=True), [" It is sunny. "])
    assert reply.content == "It is sunny."


def test_a_stream_shows_the_answer_as_it_comes():
    reader = parser()
    assert reader.push("Thought: I now know") == []
    assert streamed(reader.push(" it.\nFinal Answer: It")) == ("It", [])
    assert streamed(reader.push(" rains")) == (" rains", [])


def test_a_stream_shows_arguments_as_they_come_and_ends_with_them():
    reader = parser()
    assert streamed(reader.push("Thought: Go.\nAction: get_time\nAction Input: ")) == ("", [])
    assert streamed(reader.push('{"a"')) == ("Go.", [("get_time", '{"a"')])
    assert not reader.done
    reader.push(": 1}")
    assert reader.done
    assert reader.push("\nObservation: x") == reader.finish() == []


WORDS = st.sampled_from(
    [
        "Thought:",
        "Thought: a",
        "\nAction:",
        "Action: get_time",
        "\nAction: get_time",
        "\nAction Input:",
        "\nAction Input: {",
        '{"a": 1}',
        '"',
        "}",
        "\n",
        " ",
        "\nFinal Answer:",
        "Final Answer: x",
        "x",
        "\\",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=9).map("".join), st.data(), st.booleans())
def test_it_does_not_matter_how_a_reply_is_cut(text, data, resumed):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, deltas = read(parser(resumed), [text])
    cut, cut_deltas = read(parser(resumed), pieces)
    letters, letter_deltas = read(parser(resumed), list(text))
    assert whole == cut == letters
    assert streamed(deltas) == streamed(cut_deltas) == streamed(letter_deltas)
