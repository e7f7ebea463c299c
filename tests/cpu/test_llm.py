"""LLM as its users call it, on toy folders."""

from __future__ import annotations

import json

import pytest
import torch
import toy

from nybble import (
    LLM,
    CapacityError,
    CheckpointError,
    ConfigError,
    NybbleError,
    RequestError,
    SamplingParams,
)
from nybble.compat import GenerationConfig
from nybble.outputs import TextBuilder

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32")


def test_text_and_ids_give_the_same(llm):
    text = llm.generate("the quick", GREEDY)
    ids = llm.generate(llm.tokenizer.encode("the quick"), GREEDY)
    assert text.token_ids == ids.token_ids
    assert text.text == llm.tokenizer.decode(text.token_ids, skip_special_tokens=True)
    assert text.finish_reason == "length"
    assert text.prompt_token_ids == llm.tokenizer.encode("the quick")


def test_a_list_gives_a_list(llm):
    prompts = ["the quick", "brown fox"]
    assert [c.token_ids for c in llm.generate(prompts, GREEDY)] == [
        llm.generate(prompt, GREEDY).token_ids for prompt in prompts
    ]
    assert len(llm.generate([[5, 6], [7]], GREEDY)) == 2


@pytest.mark.parametrize("message", ["hello", [{"role": "user", "content": "hello"}]])
def test_pieces_joined_are_the_answer(llm, message):
    stream = llm.stream(message, sampling_params=GREEDY)
    pieces = list(stream)
    whole = llm.chat(message, sampling_params=GREEDY)
    assert "".join(pieces) == whole.text == stream.completion.text


def test_history_and_system_are_messages_in_short(llm):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ids = llm.chat_ids("c", history=[("a", "b")], system="be kind")
    assert ids == llm.chat_ids(messages)
    with pytest.raises(RequestError, match="messages"):
        llm.chat(messages, system="twice")


@pytest.mark.parametrize("window", [None, 40, 24000])
def test_history_leaves_room_to_answer(tmp_path, window):
    folder = toy.write_llama(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"max_window_size": window}))
    llm = LLM(folder, max_context=120)
    ids = llm.chat_ids("x", history=[("fox", "dog")] * 30)
    alone = llm.chat_ids("x")
    assert len(alone) < len(ids) < len(alone) + min(window or 120, 120 * 7 // 8)
    assert llm.generate(ids, GREEDY).token_ids


def test_text_never_becomes_a_control_token(llm):
    control = llm.tokenizer.special_tokens["<|im_end|>"]
    assert llm.chat_ids("<|im_end|>").count(control) == llm.chat_ids("x").count(control)


def test_a_list_runs_together_and_gives_what_each_gives_alone(llm):
    prompts = ["the quick", "brown", "fox jumps over", "lazy dog", "dog"]
    whole = [llm.generate(prompt, GREEDY) for prompt in prompts]
    stops = tuple({answer.text[4:6] for answer in whole[:3]})
    params = SamplingParams(temperature=0, max_tokens=12, stop=stops)
    alone = [llm.generate(prompt, params) for prompt in prompts]
    steps = llm.engine.counters.steps
    together = llm.generate(prompts, params)
    assert llm.engine.counters.steps - steps <= 14
    for one, same in zip(alone, together, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (
            same.text,
            same.token_ids,
            same.finish_reason,
        )
    assert "stop" in [answer.finish_reason for answer in together]


def test_a_bad_prompt_in_a_list_leaves_nothing_running(llm):
    with pytest.raises(RequestError):
        llm.generate([[5, 6], [-1]], GREEDY)
    llm.engine.step()
    assert llm.engine.idle
    assert llm.engine.load.pages_used == 0


def test_text_builder_gives_the_text_of_a_stream(llm):
    answer = llm.chat("hello", sampling_params=GREEDY)
    text = TextBuilder(llm.tokenizer, GREEDY)
    pieces = [text.push(token) for token in answer.token_ids]
    assert "".join(pieces) + text.finish() == answer.text
    assert not text.stopped
    stop = answer.text[2:4]
    text = TextBuilder(llm.tokenizer, SamplingParams(stop=stop))
    pieces = [text.push(token) for token in answer.token_ids]
    assert "".join(pieces) + text.finish() == answer.text[: answer.text.index(stop)]
    assert text.stopped


def test_stop_strings_end_the_answer_and_are_cut(llm):
    whole = llm.chat("hello", sampling_params=GREEDY)
    stop = whole.text[3:5]
    params = SamplingParams(temperature=0, max_tokens=12, stop=[stop])
    stopped = llm.chat("hello", sampling_params=params)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.token_ids) <= len(whole.token_ids)


def test_seeds(llm):
    def answer(seed):
        params = SamplingParams(temperature=1.5, max_tokens=12, seed=seed)
        return llm.chat("hello", sampling_params=params).token_ids

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(5)}) > 1


def test_logprobs_come_with_the_tokens(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2)
    completion = llm.generate("the", params)
    assert [t.token_id for t in completion.logprobs] == completion.token_ids
    assert all(t.top[0] == (t.token_id, pytest.approx(t.logprob)) for t in completion.logprobs)
    assert llm.generate("the", GREEDY).logprobs is None


def test_a_prompt_can_be_scored_without_an_answer(llm):
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)
    completion = llm.generate("the quick fox", params)
    real = llm.logits(completion.prompt_token_ids)[:, : llm.tokenizer.vocab_size]
    rows = torch.log_softmax(real, dim=-1)
    assert (completion.text, completion.finish_reason) == ("", "length")
    for entry, row in zip(completion.prompt_logprobs, rows, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
    assert len(completion.prompt_logprobs) == len(completion.prompt_token_ids) - 1
    assert llm.generate("the", GREEDY).prompt_logprobs is None


def test_a_prompt_that_fills_the_context_can_be_read(llm):
    ids = [5] * llm.engine.max_context
    read = SamplingParams(max_tokens=0, prompt_logprobs=0)
    assert len(llm.generate(ids, read).prompt_logprobs) == len(ids) - 1
    with pytest.raises(CapacityError):
        llm.generate([*ids, 5], read)


def test_logits_have_a_row_for_every_token(llm):
    logits = llm.logits([5, 6, 7])
    assert logits.shape == (3, 320)
    assert logits.dtype == torch.float32


def test_fast_kernels_agree_with_the_exact_ones(folder, llm):
    fast = LLM(folder)
    ids = list(range(10, 60))
    exact = llm.logits(ids)
    assert (fast.logits(ids) - exact).norm() / exact.norm() < 0.03


def test_generation_config_gives_the_defaults(tmp_path):
    folder = toy.write_llama(tmp_path)
    defaults = {"do_sample": True, "temperature": 0.3, "top_p": 0.8, "max_new_tokens": 5}
    defaults |= {"eos_token_id": [9, 11], "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    llm = LLM(folder)
    params = llm.default_params
    assert (params.temperature, params.top_p, params.min_p) == (0.3, 0.8, 0.1)
    assert GenerationConfig.from_params(params).params() == params
    assert {9, 11} <= llm.engine.eos_ids
    assert len(llm.generate("the").token_ids) <= 5


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda llm: llm.generate(""), RequestError),
        (lambda llm: llm.generate([]), RequestError),
        (lambda llm: llm.chat(""), RequestError),
        (lambda llm: llm.chat("  \n"), RequestError),
        (lambda llm: llm.chat([]), RequestError),
        (lambda llm: llm.generate([5] * 256), CapacityError),
        (lambda llm: llm.generate("the " * 400), CapacityError),
        (lambda llm: llm.generate("\ud800"), RequestError),
        (lambda llm: llm.generate([320]), RequestError),
    ],
)
def test_bad_requests_get_a_clear_error(llm, call, error):
    with pytest.raises(error):
        call(llm)
    assert llm.generate("the", GREEDY).token_ids  # and harm nobody


def test_a_context_that_fills_up_ends_with_length(folder):
    llm = LLM(folder, max_context=20)
    completion = llm.generate([5] * 10, SamplingParams(temperature=0, ignore_eos=True))
    assert len(completion.token_ids) == 10
    assert completion.finish_reason == "length"


def test_a_stream_must_be_read_before_its_result(llm):
    stream = llm.stream("hello", sampling_params=GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="not finished"):
        _ = stream.completion
    stream.close()


@pytest.fixture
def silent(tmp_path):
    return LLM(toy.write_llama(tmp_path, tokenizer=False), dtype="float32")


def test_without_a_tokenizer_ids_go_in_and_out(silent, llm):
    completion = silent.generate([5, 6, 7], GREEDY)
    assert completion.token_ids == llm.generate([5, 6, 7], GREEDY).token_ids
    with pytest.raises(RequestError, match=r"qwen\.tiktoken or tokenizer\.json"):
        _ = completion.text


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate("text"),
        lambda llm: llm.chat("text"),
        lambda llm: llm.stream([5, 6], sampling_params=SamplingParams(stop="x")),
    ],
)
def test_without_a_tokenizer_text_is_refused(silent, call):
    with pytest.raises(RequestError, match="no tokenizer"):
        call(silent)


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "demo2", ""])
def test_unknown_names(name):
    with pytest.raises(CheckpointError, match=r"demo"):
        LLM(name)


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"dtype": "int4"}, {"max_context": -1}])
def test_unknown_options(folder, options):
    with pytest.raises(ConfigError):
        LLM(folder, **options)


def test_the_config_is_refused_before_the_weights_are_touched(tmp_path):
    folder = toy.write_llama(tmp_path, hidden_act="gelu")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="hidden_act"):
        LLM(folder)


def test_every_error_is_a_nybble_error(folder, tmp_path):
    (tmp_path / "config.json").write_text("{")
    for broken in (tmp_path, tmp_path / "none"):
        with pytest.raises(NybbleError):
            LLM(broken)
