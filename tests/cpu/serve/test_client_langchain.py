"""LangChain's ChatOpenAI against the server, on a toy model."""

from __future__ import annotations

import functools
import operator
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from openai import LengthFinishReasonError
from pydantic import BaseModel, Field

from nybble import SamplingParams

langchain = pytest.importorskip("langchain_openai")
FOX = "the quick brown fox"
CHAT = [SystemMessage("the lazy dog"), HumanMessage(FOX)]


class Weather(BaseModel):
    """The weather of a place."""

    place: Literal["Paris", "北京"]
    days: int = Field(ge=0, le=9)


def client(server, max_tokens, temperature=0):
    return langchain.ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        model="toy",
        temperature=temperature,
        max_tokens=max_tokens,
        max_retries=0,
    )


@pytest.fixture
def chat(server):
    return client(server, 8)


@pytest.fixture
def tool_chat(tool_server):
    return client(tool_server, 300, temperature=1)


@pytest.fixture(scope="module")
def alone(llm):
    """What the model says without a server between."""
    messages = [
        {"role": "system", "content": CHAT[0].content},
        {"role": "user", "content": CHAT[1].content},
    ]
    return llm.chat(messages, sampling_params=SamplingParams(temperature=0, max_tokens=8))


def test_invoke(chat, alone):
    reply = chat.invoke(CHAT)
    assert isinstance(reply, AIMessage)
    assert reply.content == alone.text
    assert reply.usage_metadata["input_tokens"] == len(alone.prompt_token_ids)
    assert reply.usage_metadata["output_tokens"] == 8
    assert reply.response_metadata["finish_reason"] == "length"


def test_stream(chat, alone):
    chunks = list(chat.stream(CHAT, stream_usage=True))
    assert len(chunks) > 3
    assert "".join(chunk.content for chunk in chunks) == alone.text
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 8


def test_a_conversation_goes_on(chat):
    first = chat.invoke(CHAT)
    assert chat.invoke([*CHAT, first, HumanMessage("jumps")]).content


def test_batch(chat, alone):
    assert [reply.content for reply in chat.batch([CHAT] * 3)] == [alone.text] * 3


def test_logprobs(chat):
    reply = chat.bind(logprobs=True, top_logprobs=2).invoke(CHAT)
    assert len(reply.response_metadata["logprobs"]["content"]) == 8


def finished(run):
    """A random model may write blanks until its tokens are used up: the first that does not."""
    for seed in range(20):
        try:
            reply = run(seed)
        except LengthFinishReasonError:
            continue
        message = reply["raw"] if isinstance(reply, dict) else reply
        if message.response_metadata["finish_reason"] != "length":
            return reply
    raise AssertionError("every answer was cut off")


def test_bind_tools(tool_chat):
    bound = tool_chat.bind_tools([Weather], tool_choice="Weather")
    reply = finished(lambda seed: bound.invoke(FOX, seed=seed))
    (call,) = reply.tool_calls
    assert call["name"] == "Weather"
    Weather(**call["args"])
    seen = ToolMessage("Rain.", tool_call_id=call["id"])
    assert isinstance(tool_chat.bind_tools([Weather]).invoke([FOX, reply, seen]), AIMessage)


def test_streamed_tool_calls(tool_chat):
    bound = tool_chat.bind_tools([Weather], tool_choice="Weather")

    def run(seed):
        chunks = list(bound.stream(FOX, seed=seed))
        assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 2
        return functools.reduce(operator.add, chunks)

    (call,) = finished(run).tool_calls
    Weather(**call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(tool_chat, method):
    bound = tool_chat.with_structured_output(Weather, method=method, include_raw=True)
    reply = finished(lambda seed: bound.invoke(FOX, seed=seed))
    assert isinstance(reply["parsed"], Weather), reply


def test_json_mode(tool_chat):
    bound = tool_chat.with_structured_output(method="json_mode", include_raw=True)
    assert isinstance(finished(lambda seed: bound.invoke(FOX, seed=seed))["parsed"], dict)
