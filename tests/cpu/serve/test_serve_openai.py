"""The official openai client against the server, on a toy model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai as api
import pytest
import torch
from openai import OpenAI

from nybble import SamplingParams
from nybble.cache.store import PAGE_SIZE

CHAT = [{"role": "user", "content": "the quick brown fox"}]


def greedy(max_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def ask(openai, **fields):
    return openai.chat.completions.create(
        **{"model": "toy", "messages": CHAT, "temperature": 0, "max_tokens": 8, **fields}
    )


def complete(openai, **fields):
    return openai.completions.create(
        **{"model": "toy", "prompt": "the lazy", "temperature": 0, "max_tokens": 8, **fields}
    )


# -- chats ---------------------------------------------------------------------------------------


def test_a_chat(openai, llm):
    reply = ask(openai)
    alone = llm.chat(CHAT, sampling_params=greedy(8))
    choice = reply.choices[0]
    assert (reply.object, reply.model, len(reply.choices)) == ("chat.completion", "toy", 1)
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    assert choice.finish_reason == alone.finish_reason == "length"
    assert choice.logprobs is None
    assert reply.usage.prompt_tokens == len(alone.prompt_token_ids)
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8


def test_a_streamed_chat_is_the_same(openai, llm):
    first, *middle, end, usage = ask(openai, stream=True, stream_options={"include_usage": True})
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    text = "".join(chunk.choices[0].delta.content for chunk in middle)
    assert text == llm.chat(CHAT, sampling_params=greedy(8)).text
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
    assert end.choices[0].finish_reason == "length"
    assert end.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens == 8
    assert {chunk.object for chunk in [first, *middle, end, usage]} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created) for chunk in [first, *middle, end, usage]}) == 1


def test_usage_comes_only_when_asked_for(openai):
    chunks = list(ask(openai, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert all(len(chunk.choices) == 1 for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_each_of_n_choices_draws_its_own_numbers(openai, stream):
    fields = {"temperature": 1.5, "max_tokens": 12}
    many = ask(openai, n=3, seed=5, stream=stream, **fields)
    if stream:
        texts = ["", "", ""]
        roles, ends = [], []
        for chunk in many:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            ends += [choice.index] if choice.finish_reason else []
        assert (sorted(roles), sorted(ends)) == ([0, 1, 2], [0, 1, 2])
    else:
        assert [choice.index for choice in many.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in many.choices]
    single = [ask(openai, seed=5 + i, **fields).choices[0].message.content for i in range(3)]
    assert texts == single
    assert len(set(texts)) == 3


def test_the_seed_after_the_last_is_the_first(openai):
    fields = {"temperature": 1.0, "seed": 2**63 - 1}
    last, first = ask(openai, n=2, **fields).choices
    assert first.message.content == ask(openai, **{**fields, "seed": 0}).choices[0].message.content
    assert last.message.content == ask(openai, **fields).choices[0].message.content


def test_a_prompt_counts_once_for_all_choices_and_what_is_cached_is_told(openai):
    chat = [{"role": "user", "content": "jumps over the dog " * 12}]
    first = ask(openai, messages=chat, n=2).usage
    again = ask(openai, messages=chat).usage
    assert first.prompt_tokens == again.prompt_tokens
    assert first.completion_tokens == 16
    assert again.prompt_tokens_details.cached_tokens > 0


def test_choices_share_the_pages_of_their_prompt(openai, server):
    chat = [{"role": "user", "content": "the lazy brown dog jumps " * 30}]
    counters = server.engine.engine.counters
    before = counters.reused_tokens
    usage = ask(openai, messages=chat, n=4).usage
    reused = counters.reused_tokens - before
    assert usage.prompt_tokens > 2 * PAGE_SIZE
    assert reused >= 3 * (usage.prompt_tokens // PAGE_SIZE - 1) * PAGE_SIZE


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_text_ends_the_answer_and_is_left_out(openai, as_list):
    whole = ask(openai, max_tokens=30).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    reply = ask(openai, max_tokens=30, stop=["never there", stop] if as_list else stop)
    assert reply.choices[0].message.content == whole.split(stop)[0]
    assert reply.choices[0].finish_reason == "stop"
    chunks = list(ask(openai, max_tokens=30, stop=stop, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.split(stop)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(openai, llm, stream):
    reply = ask(openai, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in reply]
        content = [entry for c in chunks if c.logprobs for entry in c.logprobs.content]
        text = "".join(c.delta.content or "" for c in chunks)
    else:
        content = reply.choices[0].logprobs.content
        text = reply.choices[0].message.content
    alone = llm.chat(CHAT, sampling_params=greedy(8, logprobs=2))
    assert [entry.logprob for entry in content] == pytest.approx(
        [entry.logprob for entry in alone.logprobs], abs=1e-4
    )
    raw = b"".join(bytes(entry.bytes) for entry in content)
    assert raw.decode("utf-8", "replace") == text
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)  # greedy


def test_log_probabilities_end_where_the_text_does(openai):
    whole = ask(openai, max_tokens=30).choices[0].message.content
    reply = ask(openai, max_tokens=30, stop=whole[6:9], logprobs=True).choices[0]
    raw = b"".join(bytes(entry.bytes) for entry in reply.logprobs.content)
    assert raw.decode("utf-8", "replace").startswith(reply.message.content)
    last = len(reply.logprobs.content[-1].bytes)
    assert len(raw) - last <= len(reply.message.content.encode())


def test_the_bias_of_a_token_decides(openai, llm):
    (token,) = llm.tokenizer.encode("z")
    reply = ask(openai, logit_bias={str(token): 100}, max_tokens=5)
    assert reply.choices[0].message.content == "zzzzz"


def test_without_max_tokens_an_answer_goes_as_far_as_the_context(openai, server, monkeypatch):
    """generation_config.json of many models says 512 and the like."""
    service = server.host.service
    monkeypatch.setattr(service.llm, "default_params", greedy(3))
    usage = openai.chat.completions.create(
        model="toy", messages=CHAT, extra_body={"ignore_eos": True}
    ).usage
    assert usage.total_tokens == service.max_context


def test_max_completion_tokens_is_another_name(openai):
    reply = openai.chat.completions.create(
        model="toy", messages=CHAT, temperature=0, max_completion_tokens=3
    )
    assert reply.usage.completion_tokens == 3


def test_parts_of_text_and_the_developer_role(openai):
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the dog"}]
    parts = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("the ", "dog")]},
    ]
    texts = [ask(openai, messages=chat).choices[0].message.content for chat in (plain, parts)]
    assert texts[0] == texts[1]


def test_many_at_a_time_get_what_each_gets_alone(openai):
    chats = [[{"role": "user", "content": "the fox " * (i % 5 + 1)}] for i in range(12)]

    def text(chat):
        return ask(openai, messages=chat, max_tokens=12).choices[0].message.content

    alone = [text(chat) for chat in chats]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(text, chats)) == alone


# -- completions -----------------------------------------------------------------------------------


def test_completions_of_each_kind_of_prompt(openai, llm):
    texts = ["the quick", "lazy dog"]
    expected = [llm.generate(text, greedy(8)).text for text in texts]
    ids = [llm.encode(text) for text in texts]
    assert complete(openai, prompt=texts[0]).choices[0].text == expected[0]
    assert complete(openai, prompt=ids[0]).choices[0].text == expected[0]
    for prompts in (texts, ids):
        reply = complete(openai, prompt=prompts)
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.usage.prompt_tokens == sum(map(len, ids))


def test_a_streamed_completion(openai, llm):
    *chunks, usage = complete(openai, stream=True, stream_options={"include_usage": True}, n=2)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == 1)
    assert text == llm.generate("the lazy", greedy(8)).text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        "length",
        "length",
    ]
    assert usage.usage.completion_tokens == 16


def test_a_completion_has_16_tokens_when_nothing_is_said(openai):
    reply = openai.completions.create(model="toy", prompt="the", extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 16


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt_as_the_models_logits_do(openai, llm, max_tokens, stream):
    """What lm-eval's local-completions asks for."""
    text = "the quick brown fox jumps"
    ids = llm.encode(text)
    fields = {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    reply = complete(openai, stream=stream, **fields)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    found = {
        name: [item for c in choices for item in getattr(c.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    whole = "".join(choice.text for choice in choices)
    answer = llm.generate(text, greedy(max_tokens)) if max_tokens else None
    assert whole == text + (answer.text if answer else "")
    ids += answer.token_ids if answer else []
    real = llm.logits(ids)[:, : llm.tokenizer.vocab_size]  # the rest is padding
    rows = torch.log_softmax(real, dim=-1)
    expected = [rows[i, token].item() for i, token in enumerate(ids[1:])]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    best = [max(top.values()) for top in found["top_logprobs"][1:]]
    assert best == pytest.approx(rows[: len(expected)].amax(dim=-1).tolist(), abs=1e-4)
    offsets = [*found["text_offset"], len(whole)]
    for token, begin, end in zip(found["tokens"], offsets, offsets[1:], strict=False):
        assert token.startswith("bytes:") or whole[begin:end] == token


def test_echo_without_log_probabilities(openai, llm):
    reply = complete(openai, prompt=["the fox", "a dog"], echo=True, max_tokens=3)
    expected = [text + llm.generate(text, greedy(3)).text for text in ("the fox", "a dog")]
    assert [choice.text for choice in reply.choices] == expected
    assert complete(openai, prompt="the fox", echo=True, max_tokens=0).choices[0].text == "the fox"


# -- what is refused -------------------------------------------------------------------------------


def test_an_unknown_model(openai):
    with pytest.raises(api.NotFoundError) as caught:
        ask(openai, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_that_is_too_long(openai):
    with pytest.raises(api.BadRequestError) as caught:
        ask(openai, messages=[{"role": "user", "content": "xyz " * 400}])
    assert caught.value.code == "context_length_exceeded"


CHAT_FIELDS = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": -4}, "seed"),
    ({"stop": [1]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"5000": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
    ),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"store": True}, "store"),
    ({"extra_body": {"made_up": 1}}, "made_up"),
    ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs.messages"),
    ({"extra_body": {"chat_template_kwargs": {"self": 1}}}, "chat_template_kwargs.self"),
    ({"extra_body": {"top_k": -1}}, "top_k"),
    ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
]


@pytest.mark.parametrize(("fields", "param"), CHAT_FIELDS, ids=str)
def test_a_bad_field_of_a_chat_is_named(openai, fields, param):
    with pytest.raises(api.BadRequestError) as caught:
        ask(openai, **fields)
    assert caught.value.param == param
    assert param.split("[")[0] in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


COMPLETION_FIELDS = [
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"logprobs": 21}, "logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1], ["a"]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETION_FIELDS, ids=str)
def test_a_bad_field_of_a_completion_is_named(openai, fields, param):
    with pytest.raises(api.BadRequestError) as caught:
        complete(openai, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", ["", [[]], [70000], [-1]])
def test_prompts_that_no_model_can_read(openai, prompt):
    with pytest.raises(api.BadRequestError):
        complete(openai, prompt=prompt)


def test_fields_that_are_null_count_as_left_out(http):
    fields = {"tools": None, "functions": None, "stop": None, "seed": None, "made_up": None}
    body = {"model": "toy", "messages": CHAT, "max_tokens": 2, **fields}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_fields_that_are_taken_for_the_clients_sake(openai):
    ask(openai, user="somebody", store=False, service_tier="auto")


# -- the other routes ------------------------------------------------------------------------------


def test_models(openai):
    (model,) = openai.models.list().data
    assert (model.id, model.object, model.owned_by) == ("toy", "model", "nybble")
    assert openai.models.retrieve("toy").id == "toy"
    with pytest.raises(api.NotFoundError):
        openai.models.retrieve("other")


def test_embeddings_are_not_implemented(openai):
    with pytest.raises(api.InternalServerError) as caught:
        openai.embeddings.create(model="toy", input="x")
    assert caught.value.status_code == 501
    assert caught.value.code == "not_implemented"


def test_tokens_there_and_back(http, llm):
    reply = http.post("/tokenize", json={"prompt": "the fox", "return_token_strs": True}).json()
    assert reply["tokens"] == llm.encode("the fox")
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 256)
    assert "".join(reply["token_strs"]) == "the fox"
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {
        "prompt": "the fox"
    }
    chat = http.post("/tokenize", json={"messages": CHAT}).json()
    assert chat["tokens"] == llm.chat_ids(CHAT)
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [99999]}).status_code == 400


def test_a_client_without_retries_gets_the_key_error(llm):
    from serving import serving

    with serving(llm, api_key="secret") as server:
        url = f"{server.url}/v1"
        good = OpenAI(base_url=url, api_key="secret", max_retries=0)
        assert ask(good).choices
        with pytest.raises(api.AuthenticationError) as caught:
            ask(OpenAI(base_url=url, api_key="wrong", max_retries=0))
        assert caught.value.code == "invalid_api_key"
