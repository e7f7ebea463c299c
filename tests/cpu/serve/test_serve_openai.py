"""The official openai client against the server, on a toy model."""

import openai as api
import pytest

CHAT = [{"role": "user", "content": "the quick brown fox"}]


def test_a_chat(openai, llm):
    reply = openai.chat.completions.create(model="toy", messages=CHAT, temperature=0, max_tokens=8)
    alone = llm.chat(CHAT, sampling_params=greedy(8))
    choice = reply.choices[0]
    assert reply.object == "chat.completion"
    assert reply.model == "toy"
    assert choice.message.role == "assistant"
    assert choice.message.content == alone.text
    assert choice.finish_reason == alone.finish_reason == "length"
    assert reply.usage.prompt_tokens == len(alone.prompt_token_ids)
    assert reply.usage.completion_tokens == 8


def test_a_streamed_chat_is_the_same(openai, llm):
    stream = openai.chat.completions.create(
        model="toy",
        messages=CHAT,
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *middle, end, usage = stream
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content for chunk in middle)
    assert text == llm.chat(CHAT, sampling_params=greedy(8)).text
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
    assert end.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 8
    assert len({chunk.id for chunk in [first, *middle, end, usage]}) == 1


def test_an_unknown_model(openai):
    with pytest.raises(api.NotFoundError) as caught:
        openai.chat.completions.create(model="gpt-4", messages=CHAT)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def greedy(max_tokens):
    from nybble import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens)
