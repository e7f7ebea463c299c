"""LangChain's ChatOpenAI against the server, on a toy model."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from nybble import SamplingParams

langchain = pytest.importorskip("langchain_openai")
CHAT = [SystemMessage("the lazy dog"), HumanMessage("the quick brown fox")]


@pytest.fixture
def chat(server):
    return langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="toy", temperature=0, max_tokens=8
    )


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
