"""Many requests in common steps: company changes no answer, and no failure spreads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine import replay
from nybble.errors import CapacityError, NumericsError, UnavailableError
from nybble.model.decoder import Decoder
from nybble.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=10)
PREFIX = [(7 * i) % 150 for i in range(200)]
KINDS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"temperature": 0.9, "seed": 1, "top_p": 0.8},
    {"temperature": 1.3, "seed": 2},
    {"temperature": 1.0, "seed": 3, "top_k": 7, "logprobs": 2},
    {"temperature": 0.7, "seed": 4, "top_p": 0.9, "presence_penalty": 0.5},
]


def run_all(engine, requests):
    """All together; returns the ids and the finish_reason of each."""
    generations = [engine.generate(prompt, params) for prompt, params in requests]
    for generation in generations:
        generation.start()
    for generation in generations:
        list(generation)
    assert engine.idle
    assert engine.load.pages_used == 0
    for generation in generations:
        wanted = generation.params.logprobs is not None
        assert [entry.token_id for entry in generation.logprobs] == generation.token_ids * wanted
    return [(g.token_ids, g.finish_reason) for g in generations]


def mixed_requests(count, longest=150):
    lengths = [1 + (37 * i) % longest for i in range(count)]
    return [
        (
            [(i * 31 + j * j) % 150 for j in range(length)],
            SamplingParams(**KINDS[i % len(KINDS)], max_tokens=4 + i % 7),
        )
        for i, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("kind", ["float32", "int4"])
@pytest.mark.parametrize("name", ["qwen1-plain", "qwen1-ntk-logn"])
def test_a_batch_gives_each_the_answer_it_would_get_alone(make_engine, data, name, kind):
    """Greedy and seeded, long and short prompts, on different NTK bases."""
    requests = mixed_requests(12)
    options = {"max_context": 400, "kv_dtype": kind}
    alone = make_engine(data / name, share_prefixes=False, **options)
    expected = [run_all(alone, [request])[0] for request in requests]
    engine = make_engine(data / name, max_running=8, prefill_chunk=96, **options)
    assert engine.max_running == 8
    assert run_all(engine, requests) == expected
    assert run_all(engine, requests[::-1]) == expected[::-1]  # now with reused prefixes


def test_preemption_changes_no_answer(make_engine, data):
    requests = [(prompt[:60], params) for prompt, params in mixed_requests(6)]
    requests = [(p, dataclasses.replace(params, max_tokens=80)) for p, params in requests]
    roomy = make_engine(data / "qwen1-plain", max_context=200)
    expected = run_all(roomy, requests)
    assert roomy.scheduler.preemptions == 0
    tight = make_engine(data / "qwen1-plain", max_context=200, cache_tokens=320)
    assert run_all(tight, requests) == expected
    assert tight.scheduler.preemptions > 0


def test_four_bits_run_as_many_as_they_have_seats_for(make_engine, data):
    requests = mixed_requests(6)
    options = {"max_context": 400, "kv_dtype": "int4"}
    expected = run_all(make_engine(data / "qwen1-plain", **options), requests)
    engine = make_engine(data / "qwen1-plain", cache_tokens=2 * 2048, **options)
    assert engine.max_running == 2
    assert run_all(engine, requests) == expected


def test_a_cache_smaller_than_the_context_bounds_the_context(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=1000, cache_tokens=64)
    assert engine.max_context == 64
    generation = engine.generate([1, 2, 3], SamplingParams(temperature=0))
    assert len(list(generation)) == 61
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_a_shared_prefix_is_computed_once_and_changes_nothing(make_engine, data, kind):
    requests = [([*PREFIX, number], GREEDY) for number in range(6)]
    options = {"max_context": 400, "kv_dtype": kind}
    plain = make_engine(data / "qwen1-plain", share_prefixes=False, **options)
    sharing = make_engine(data / "qwen1-plain", **options)
    assert run_all(sharing, requests) == run_all(plain, requests)
    assert plain.counters.reused_tokens == 0
    assert sharing.counters.reused_tokens == 5 * 192  # three pages, computed by the first


def test_many_run_in_one_step(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=400)
    run_all(engine, [([number], GREEDY) for number in range(16)])
    assert engine.counters.steps <= 12
    assert engine.counters.new_tokens == 160


def test_requests_beyond_max_running_wait_and_finish(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_running=2)
    results = run_all(engine, [([number], GREEDY) for number in range(7)])
    assert all(len(ids) == 10 for ids, _ in results)


def poisoned(engine, token):
    """The engine with an embedding that is NaN for one token."""
    weights = engine.decoder.embed_tokens.clone()
    weights[token] = torch.nan
    engine.decoder = dataclasses.replace(engine.decoder, embed_tokens=weights)
    return engine


def test_a_request_that_turns_nan_ends_alone_and_its_pages_are_not_reused(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=400)
    prompt = [*PREFIX, 155]
    expected = run_all(engine, [(PREFIX, GREEDY)])[0]
    engine = poisoned(make_engine(data / "qwen1-plain", max_context=400, prefill_chunk=64), 155)
    good, bad = engine.generate(PREFIX, GREEDY), engine.generate(prompt, GREEDY)
    for generation in (bad, good):
        generation.start()
    with pytest.raises(NumericsError, match="the embedding"):
        list(bad)
    with pytest.raises(NumericsError):
        next(bad)
    assert list(good) == expected[0]
    assert engine.load.pages_used == 0


@pytest.mark.parametrize("error", [CapacityError("full"), torch.OutOfMemoryError("full")])
def test_without_room_to_look_for_the_place_it_still_ends_alone(
    make_engine, data, monkeypatch, error
):
    def full(*_):
        raise error

    engine = poisoned(make_engine(data / "qwen1-plain", max_context=400), 155)
    good, bad = engine.generate([5], GREEDY), engine.generate([1, 155], GREEDY)
    good.start()
    monkeypatch.setattr(replay, "KVStore", full)
    with pytest.raises(NumericsError, match=f"could not be looked for.*{type(error).__name__}"):
        list(bad)
    assert len(list(good)) == 10


def test_a_sequence_is_run_again_with_few_rows_of_logits_at_a_time(make_engine, data, monkeypatch):
    engine = make_engine(data / "qwen1-plain", prefill_chunk=2000)
    rows, head = [], Decoder.head
    monkeypatch.setattr(Decoder, "head", lambda self, x: rows.append(len(x)) or head(self, x))
    assert engine.logits([1] * 1100).shape[0] == 1100
    replay.first_nonfinite(engine.decoder, [1] * 1100, "float32", 1.0, 2000)
    assert rows == [512, 512, 76] * 2


def test_a_step_that_fails_ends_all_and_the_engine_goes_on(make_engine, data, monkeypatch):
    engine = make_engine(data / "qwen1-plain", max_context=400)
    expected = run_all(engine, [(PREFIX, GREEDY)])
    first, second = engine.generate(PREFIX, GREEDY), engine.generate([5], GREEDY)
    second.start()
    next(first)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(first)
    for generation in (first, second):
        with pytest.raises(UnavailableError, match="KeyboardInterrupt"):
            list(generation)
    assert engine.idle
    assert engine.load.pages_used == 0
    assert run_all(engine, [(PREFIX, GREEDY)]) == expected
    assert engine.counters.reused_tokens > 0  # what was sound is still there


def test_an_interrupt_in_the_bookkeeping_starts_it_afresh(make_engine, data, monkeypatch):
    engine = make_engine(data / "qwen1-plain", max_context=400)
    expected = run_all(engine, [(PREFIX, GREEDY)])
    generation = engine.generate([*PREFIX, 1], GREEDY)
    next(generation)
    allocate = engine.scheduler._decode

    def interrupted():
        yield from allocate()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.scheduler, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert run_all(engine, [(PREFIX, GREEDY)]) == expected


@pytest.mark.parametrize("aborted", [False, True])
def test_an_interrupt_while_a_request_ends_leaves_a_sound_engine(
    make_engine, data, monkeypatch, aborted
):
    engine = make_engine(data / "qwen1-plain", max_context=400)
    short = engine.request([7], SamplingParams(temperature=0, max_tokens=2))
    engine.add(short)
    engine.step()
    if aborted:
        engine.abort(short)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.pool, "release", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert short.done
    assert engine.idle
    assert len(run_all(engine, [(PREFIX, GREEDY)])[0][0]) == 10
    engine.scheduler.check()


def test_a_dropped_generation_gives_its_pages_back(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=400)
    dropped = engine.generate(PREFIX, GREEDY)
    next(dropped)
    assert engine.load.pages_used > 0
    del dropped
    engine.step()
    assert engine.load.pages_used == 0
    assert engine.idle


def test_closing_before_the_start_or_after_the_end_is_harmless(make_engine, data):
    engine = make_engine(data / "qwen1-plain")
    unstarted = engine.generate([1], GREEDY)
    unstarted.close()
    engine.step()
    assert list(unstarted) == []
    assert unstarted.finish_reason is None
    finished = engine.generate([1], GREEDY)
    ids = list(finished)
    finished.close()
    engine.step()
    assert (finished.token_ids, finished.finish_reason) == (ids, "length")


@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(6)),
    cuts=st.lists(st.integers(0, 12), min_size=6, max_size=6),
    chunk=st.sampled_from([8, 50, 512]),
)
def test_any_order_of_reading_and_closing(make_engine, data, order, cuts, chunk):
    requests = mixed_requests(6)
    engine = make_engine(data / "qwen1-plain", max_context=300, prefill_chunk=chunk)
    expected = [run_all(engine, [request])[0][0] for request in requests]
    generations = [engine.generate(prompt, params) for prompt, params in requests]
    for index in order:
        generations[index].start()
    for index in order:
        for _, token in zip(range(cuts[index]), generations[index], strict=False):
            assert token == generations[index].token_ids[-1]
        generations[index].close()
        count = len(generations[index].token_ids)
        assert generations[index].token_ids == expected[index][:count]
    engine.step()
    assert engine.load.pages_used == 0
