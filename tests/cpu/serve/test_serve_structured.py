"""Answers in a required form through the openai client, and what of tools and forms is refused."""

from __future__ import annotations

import gc
import json
import re
import threading

import httpx2
import jsonschema
import openai as api
import pytest
from pydantic import BaseModel
from serving import serving, wait_for
from talking import ASK, SCHEMA, TIME, TOOLS, schema_format

from nybble.grammar import GrammarCompiler


class Trip(BaseModel):
    city: str
    days: int


def test_a_pydantic_model(talker):
    reply = talker.client.chat.completions.parse(
        model="toy",
        messages=ASK,
        response_format=Trip,
        max_tokens=200,
        temperature=1.0,
        seed=3,
        logit_bias={**talker.closing(90), talker.llm.tokenizer.encode(",")[0]: 60},
    )
    assert isinstance(reply.choices[0].message.parsed, Trip)


def test_json_schema_whole_and_streamed(talker):
    fields = {"response_format": schema_format(SCHEMA), "temperature": 0}
    fields["logit_bias"] = talker.closing()
    text = talker.ask(**fields).choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)
    assert talker.stream(**fields)[0] == text


def test_a_json_object(talker):
    fields = {"response_format": {"type": "json_object"}, "logit_bias": talker.closing(90)}
    choice = talker.ask(**fields, temperature=0).choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(json.loads(choice.message.content), dict)


def test_plain_text_is_what_it_is_without(talker):
    free = talker.ask(temperature=0, max_tokens=9).choices[0].message.content
    fields = {"response_format": {"type": "text"}, "temperature": 0, "max_tokens": 9}
    assert talker.ask(**fields).choices[0].message.content == free


def test_a_schema_and_tools(talker):
    """The answer is JSON, or a call: never anything else."""
    fields = {"tools": TOOLS, "response_format": schema_format(SCHEMA), "temperature": 1.0}
    fields |= {"logit_bias": talker.closing(), "max_tokens": 500}
    reply = talker.ask(**fields, n=4, seed=5)
    for choice in reply.choices:
        if choice.finish_reason == "tool_calls":
            assert choice.message.tool_calls
        elif choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)


# -- what is refused -------------------------------------------------------------------------------

NOT = {"type": "object", "properties": {"a": {"not": {}}}}
NAMED = {"type": "function", "function": {"name": "nobody"}}
STRICT = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": NOT}}]
LONG = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(499)}}
CASES = [
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"function_call": "auto"}, "function_call"),
    ({"tools": []}, "tools"),
    ({"tools": TOOLS, "functions": [TIME]}, "functions"),
    ({"tools": TOOLS, "tool_choice": NAMED}, "tool_choice"),
    ({"functions": [TIME], "function_call": {"name": "nobody"}}, "function_call"),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "a b"}}},
     "tool_choice.function.name"),
    ({"functions": [TIME], "function_call": {}}, "function_call.name"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": STRICT}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": NOT}}],
      "tool_choice": "required"}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
     "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{i}", "parameters": LONG}}
                for i in range(2)], "tool_choice": "required"}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": schema_format(NOT)}, "response_format"),
    ({"response_format": schema_format(NOT), "tools": TOOLS}, "response_format"),
    ({"response_format": schema_format({"type": "integer", "minimum": 2, "maximum": 1})},
     "response_format"),
    ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}},
     "ignore_eos"),
    ({"messages": [*ASK, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages"),
    ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
     "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "a": 1}]}]},
     "messages[0].content[0].a"),
    ({"messages": [3]}, "messages[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), CASES, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_named(talkers, fields, param):
    with pytest.raises(api.BadRequestError) as caught:
        talkers["hermes"].ask(**fields)
    assert caught.value.param == param
    assert caught.value.body["message"].endswith(".")
    assert not re.search(r"ChatMessage|Input|literal", caught.value.body["message"])


def test_the_keyword_that_cannot_be_kept_is_named(talkers):
    with pytest.raises(api.BadRequestError, match="schema/properties/a/not cannot be enforced"):
        talkers["react"].ask(response_format=schema_format(NOT))


def test_a_compilation_that_takes_too_long(talkers, monkeypatch):
    monkeypatch.setattr("nybble.serve.structured.COMPILE_SECONDS", 0.0)
    with pytest.raises(api.BadRequestError, match="simplify the schema") as caught:
        talkers["react"].ask(response_format=schema_format(SCHEMA))
    assert caught.value.param == "response_format"


@pytest.fixture
def stuck(monkeypatch):
    """What lets compilations go on; a request gives up on them soon."""
    go_on = threading.Event()
    monkeypatch.setattr("nybble.serve.structured.COMPILE_SECONDS", 0.1)
    monkeypatch.setattr(GrammarCompiler, "json_schema", lambda *_: go_on.wait())
    return go_on


def test_a_compilation_without_end_holds_up_other_compilations_alone(talkers, stuck, monkeypatch):
    server = talkers["react"].server
    body = {"messages": ASK, "max_tokens": 1}
    wanted = {**body, "response_format": {"type": "json_object"}}
    with server.client() as http:

        def status(body):
            return http.post("/v1/chat/completions", json=body).status_code

        assert [status(wanted), status(wanted)] == [400, 429]
        assert [status(body), status({**body, "tools": TOOLS})] == [200, 200]
        stuck.set()
        wait_for(lambda: not server.host.service.compiling.locked())
        monkeypatch.undo()
        assert status(wanted) == 200


def test_a_server_that_is_stopped_while_it_compiles_does_not_wait(llm, stuck):
    """A thread of asyncio's pool would be waited for, here for ever."""
    wanted = {"messages": ASK, "response_format": {"type": "json_object"}}
    with serving(llm) as server, server.client() as http:
        assert http.post("/v1/chat/completions", json=wanted).status_code == 400
    stuck.set()


def test_a_thread_that_cannot_start_takes_nobodys_turn(talkers, monkeypatch):
    def refused(*_):
        raise RuntimeError("can't start new thread")

    server = talkers["react"].server
    wanted = {"messages": ASK, "max_tokens": 1, "response_format": {"type": "json_object"}}
    with monkeypatch.context() as broken, server.client() as http:
        broken.setattr("nybble.serve.structured.in_daemon", refused)
        assert http.post("/v1/chat/completions", json=wanted).status_code == 500
    with server.client() as http:
        assert http.post("/v1/chat/completions", json=wanted).status_code == 200


def test_who_hangs_up_gives_up_the_turn(talkers, monkeypatch):
    go_on, compiled, real = threading.Event(), [], GrammarCompiler.json_schema

    def counted(self, schema, *rest):
        compiled.append(schema)
        go_on.wait()
        return real(self, schema, *rest)

    monkeypatch.setattr(GrammarCompiler, "json_schema", counted)
    server = talkers["react"].server
    wanted = {"messages": ASK, "max_tokens": 1, "response_format": {"type": "json_object"}}
    with server.client() as http:
        for _ in range(5):
            with pytest.raises(httpx2.TimeoutException):
                http.post("/v1/chat/completions", json=wanted, timeout=0.3)
        go_on.set()
        assert http.post("/v1/chat/completions", json=wanted).status_code == 200
    # The first, which cannot be broken off, the last, and perhaps one that had just hung up.
    assert len(compiled) <= 3


def test_a_compilation_that_fails_when_nobody_waits_is_no_noise(talkers, monkeypatch, caplog):
    go_on = threading.Event()

    def failing(*_):
        go_on.wait()
        raise RuntimeError("too late")

    monkeypatch.setattr("nybble.serve.structured.COMPILE_SECONDS", 0.1)
    monkeypatch.setattr(GrammarCompiler, "json_schema", failing)
    server = talkers["react"].server
    wanted = {"messages": ASK, "response_format": {"type": "json_object"}}
    with server.client() as http:
        assert http.post("/v1/chat/completions", json=wanted).status_code == 400
    go_on.set()
    wait_for(lambda: not server.host.service.compiling.locked())
    gc.collect()
    assert "never retrieved" not in caplog.text
