"""Requests against a toy model: ends, limits, the shared prefix, and faults."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nybble.errors import CapacityError, NumericsError, RequestError
from nybble.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPT = [3, 14, 15, 92, 65]


@pytest.fixture
def engine(make_engine, data):
    return make_engine(data / "qwen1-plain")


def run(engine, prompt=PROMPT, params=GREEDY):
    generation = engine.generate(prompt, params)
    return list(generation), generation


def test_max_tokens_ends_with_length(engine):
    ids, generation = run(engine)
    assert len(ids) == 8
    assert generation.finish_reason == "length"
    assert generation.token_ids == ids


def test_an_eos_ends_with_stop_and_is_not_part_of_the_answer(make_engine, data, engine):
    ids, _ = run(engine)
    stopping = make_engine(data / "qwen1-plain", eos_ids=(ids[3],))
    shorter, generation = run(stopping)
    assert shorter == ids[: ids.index(ids[3])]
    assert generation.finish_reason == "stop"
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    assert run(stopping, params=ignoring)[0] == ids


def test_stop_token_ids(engine):
    ids, _ = run(engine)
    params = dataclasses.replace(GREEDY, stop_token_ids=(ids[2],), ignore_eos=True)
    stopped, generation = run(engine, params=params)
    assert stopped == ids[: ids.index(ids[2])]
    assert generation.finish_reason == "stop"


def test_the_context_ends_an_answer_with_length(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=9)
    ids, generation = run(engine, params=SamplingParams(temperature=0))
    assert len(PROMPT) + len(ids) == 9
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("prompt", [[], [160], [-1], ["a"], [1.5]], ids=str)
def test_bad_ids_are_refused(engine, prompt):
    with pytest.raises(RequestError):
        engine.generate(prompt, GREEDY)
    with pytest.raises(RequestError):
        engine.logits(prompt)


def test_a_prompt_longer_than_the_context_is_refused_and_harms_nobody(engine):
    before, _ = run(engine)
    with pytest.raises(CapacityError, match="64"):
        engine.generate([1] * 64, GREEDY)
    assert run(engine)[0] == before


def test_unused_ids_are_never_sampled(make_engine, data, engine):
    ids, _ = run(engine)
    masked = make_engine(data / "qwen1-plain", unused_ids=[ids[0]])
    assert ids[0] not in run(masked)[0]


def test_full_pages_of_a_shared_prefix_are_reused_and_change_nothing(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=400)
    prompt = [(11 * i) % 150 for i in range(130)]
    first, cold = run(engine, prompt)
    assert cold.timing.reused_tokens == 0
    longer = [*prompt, *first, 7]
    warm, generation = run(engine, longer)
    assert generation.timing.reused_tokens == 128
    fresh = make_engine(data / "qwen1-plain", max_context=400)
    assert warm == run(fresh, longer)[0]
    again, repeated = run(engine, prompt[:128])  # the last token always runs
    assert repeated.timing.reused_tokens == 64
    assert again == run(fresh, prompt[:128])[0]


def test_no_reuse_across_ntk_bases(make_engine, data):
    engine = make_engine(data / "qwen1-ntk-logn", max_context=400)
    fresh = make_engine(data / "qwen1-ntk-logn", max_context=400)
    run(engine, list(range(100)))
    ids, generation = run(engine, list(range(130)))
    assert generation.timing.reused_tokens == 0
    assert ids == run(fresh, list(range(130)))[0]
    run(engine, list(range(65, 145)))
    assert run(engine, list(range(65, 145)))[1].timing.reused_tokens == 64


def test_two_requests_may_be_interleaved(engine):
    alone = [run(engine, prompt)[0] for prompt in ([1, 2, 3], [4, 5, 6])]
    a, b = engine.generate([1, 2, 3], GREEDY), engine.generate([4, 5, 6], GREEDY)
    assert [list(pair) for pair in zip(*zip(a, b, strict=True), strict=True)] == alone


def test_an_abandoned_request_frees_the_cache(engine):
    expected, _ = run(engine)
    generation = engine.generate(PROMPT, GREEDY)
    tokens = iter(generation)
    assert [next(tokens), next(tokens)] == expected[:2]
    generation.close()
    assert generation.finish_reason is None
    assert run(engine)[0] == expected


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_values_name_the_layer_where_they_began(make_engine, data, poison):
    engine = make_engine(data / "qwen1-plain")
    decoder = engine.decoder
    good = run(engine)[0]
    broken = dataclasses.replace(
        decoder.layers[1], input_norm=torch.full_like(decoder.layers[1].input_norm, poison)
    )
    engine.decoder = dataclasses.replace(decoder, layers=(decoder.layers[0], broken))
    with pytest.raises(NumericsError, match="layer 1"):
        run(engine, [9, 8, 7])
    with pytest.raises(NumericsError, match="layer 1"):
        engine.logits([9, 8, 7])
    engine.decoder = decoder
    assert run(engine)[0] == good  # nothing of the broken run is reused


def test_the_cache_grows_and_keeps_what_it_holds(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=2000)
    long, _ = run(engine, params=SamplingParams(temperature=0, max_tokens=600))
    logits = engine.logits(PROMPT + long)
    assert [int(row.argmax()) for row in logits[len(PROMPT) - 1 : -1]] == long
