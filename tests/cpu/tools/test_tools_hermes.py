"""Hermes: messages for chat templates, and replies in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replies import calls_of, read, streamed

from nybble.errors import RequestError
from nybble.tools import HermesFormat, Tool

TOOLS = [Tool("f", "Does f.", {"type": "object", "properties": {"a": {}}}), Tool("g")]


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def parser(at_most=None):
    return HermesFormat().parser(TOOLS, at_most=at_most)


def test_templates_get_tools_and_arguments_as_data():
    function = {"name": "f", "arguments": '{"a": "é"}'}
    asked = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    answer = {"role": "tool", "tool_call_id": "1", "content": "done"}
    result = HermesFormat().prompt([{"role": "user", "content": "?"}, asked, answer], TOOLS)
    assert result.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": "é"}
    assert result.messages[2] == answer
    assert result.tools[0] == {
        "type": "function",
        "function": {
            "name": "f",
            "description": "Does f.",
            "parameters": {"type": "object", "properties": {"a": {}}},
        },
    }
    assert result.tools[1] == {"type": "function", "function": {"name": "g"}}
    assert result.reply == ""


def test_arguments_of_earlier_calls_that_are_no_json_stay_text():
    asked = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{oops"}}],
    }
    answer = {"role": "tool", "tool_call_id": "1", "content": "bad"}
    result = HermesFormat().prompt([asked, answer], TOOLS)
    assert result.messages[0]["tool_calls"][0]["function"]["arguments"] == "{oops"


def test_parameters_must_be_an_object():
    with pytest.raises(RequestError, match="'h' are no object"):
        Tool("h", parameters={"type": "string"})


REPLIES = {
    "text alone": ("Hello\n\n there. ", "Hello\n\n there. ", []),
    "a call": (call("f", '{"a": 1}'), "", [("f", '{"a": 1}')]),
    "text, then calls": (
        f"Let me see.\n{call('f', '{}')}\n{call('g', '{}')}\n",
        "Let me see.",
        [("f", "{}"), ("g", "{}")],
    ),
    "text behind a call": (f"{call('f', '{}')}\nDone.", "\nDone.", [("f", "{}")]),
    "no line breaks": (
        '<tool_call>{"name":"f","arguments":{"a":{"b":"}"}}}</tool_call>',
        "",
        [("f", '{"a":{"b":"}"}}')],
    ),
    "tags inside a string": (
        call("f", '{"a": "</tool_call><tool_call>"}'),
        "",
        [("f", '{"a": "</tool_call><tool_call>"}')],
    ),
    "arguments first": (
        '<tool_call>\n{"arguments": {"a": "é"}, "name": "g"}\n</tool_call>',
        "",
        [("g", '{"a": "é"}')],
    ),
    "no arguments": ('<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
    "the end tag is missing": (call("f", "{}")[:-13], "", [("f", "{}")]),
    "the end tag is missing, and text follows": (
        f"{call('f', '{}')[:-13]} \nDone. }}",
        "Done. }",
        [("f", "{}")],
    ),
    "the end tag is missing, and a call follows": (
        f"{call('f', '{}')[:-13]}\n{call('g', '{}')}",
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    "a brace too many": (
        f"{call('f', '{}}')}\n{call('g', '{}')} yes",
        " yes",
        [("f", "{}"), ("g", "{}")],
    ),
    "more than a name and arguments": (
        '<tool_call>{"name": "f", "arguments": {}, "id": "}"}</tool_call> yes',
        " yes",
        [("f", "{}")],
    ),
    "a tool that was not offered": (
        f"Hm.\n\n{call('rm', '{}')} yes",
        f"Hm.\n\n{call('rm', '{}')} yes",
        [],
    ),
    "no JSON": ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
    "arguments that are no object": (call("f", "[1]"), call("f", "[1]"), []),
    "arguments in Python": (call("f", "{'a': True}"), call("f", "{'a': True}"), []),
    "arguments that were cut": (
        'So. <tool_call>\n{"name": "f", "arguments": {"a": "x',
        'So. <tool_call>\n{"name": "f", "arguments": {"a": "x',
        [],
    ),
    "a bad call, then a good one": (
        f"{call('f', '{1}')}\n{call('g', '{}')}",
        call("f", "{1}"),
        [("g", "{}")],
    ),
    "space behind a bad call": (f"{call('f', '{1}')} \n", f"{call('f', '{1}')} \n", []),
    "half a tag": ("a < b <tool_cal", "a < b <tool_cal", []),
    "an open tag": ("a <tool_call>", "a <tool_call>", []),
    "nothing": ("", "", []),
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies(name):
    text, content, calls = REPLIES[name]
    reply, _ = read(parser(), [text])
    assert (reply.content, calls_of(reply)) == (content, calls)


def test_a_stream_shows_text_and_arguments_as_they_come():
    reader = parser()
    assert streamed(reader.push("Let me see. <too")) == ("Let me see.", [])
    assert reader.push('l_call>\n{"name": "f", "argu') == []
    assert streamed(reader.push('ments": {"a": "x')) == ("", [("f", '{"a": "x')])
    deltas = reader.push(' y"}}\n</tool_call>')
    assert [getattr(delta, "arguments", None) for delta in deltas[:1]] == [' y"}']
    assert deltas[-1].sound
    assert not reader.done


def test_one_call_is_enough_where_no_more_are_wanted():
    reader = parser(at_most=1)
    text = f"{call('f', '{}')}\n{call('g', '{}')}"
    reply, _ = read(reader, [text])
    assert calls_of(reply) == [("f", "{}")]
    assert reader.done


WORDS = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": ',
        '{"name": "x", "arguments": {}',
        '<tool_call>{"name": "f", "arguments": {}',
        '{"a": 1}',
        "{",
        "}",
        '"',
        "\\",
        "\n",
        " ",
        "x",
        "<",
        "1",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=9).map("".join), st.data(), st.sampled_from([None, 1]))
def test_it_does_not_matter_how_a_reply_is_cut(text, data, at_most):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, deltas = read(parser(at_most), [text])
    cut, cut_deltas = read(parser(at_most), pieces)
    letters, letter_deltas = read(parser(at_most), list(text))
    assert whole == cut == letters
    assert streamed(deltas) == streamed(cut_deltas) == streamed(letter_deltas)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, max_size=9).map("".join))
def test_nothing_is_lost(text):
    """Without sound calls, the whole reply is text; with them, all that is not in them."""
    reply, _ = read(parser(), [text])
    if not reply.calls:
        assert reply.content == text
    for made in reply.calls:
        assert isinstance(json.loads(made.arguments), dict)
