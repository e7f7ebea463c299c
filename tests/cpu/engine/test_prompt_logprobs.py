"""Log-probabilities of prompts, computed in the same steps as everything else."""

from __future__ import annotations

import pytest
import torch

from nybble.errors import NumericsError, RequestError
from nybble.sampling import SamplingParams

PROMPTS = [[(i * 31 + j * j) % 150 for j in range(length)] for i, length in enumerate((90, 1, 40))]


def params(**changes):
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "prompt_logprobs": 2, **changes})


def expected(engine, ids):
    return torch.log_softmax(engine.logits(ids).double(), dim=-1)


def check(engine, generation):
    """Against the logits of the same tokens, computed by themselves."""
    ids = generation.prompt_ids
    rows = expected(engine, ids)
    entries = generation.prompt_logprobs
    assert [entry.token_id for entry in entries] == ids[1:]
    for row, entry in zip(rows, entries, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        values, best = row.topk(2)
        assert [token for token, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", ["qwen1-plain", "qwen1-ntk-logn"])
def test_they_are_what_the_model_says_and_change_no_answer(make_engine, data, name):
    engine = make_engine(data / name, max_context=300, prefill_chunk=32)
    plain = [list(engine.generate(ids, params(prompt_logprobs=None))) for ids in PROMPTS]
    generations = [engine.generate(ids, params()) for ids in PROMPTS]
    company = engine.generate(PROMPTS[0][:50], params(prompt_logprobs=None))
    for generation in [*generations, company]:
        generation.start()
    assert [list(generation) for generation in generations] == plain
    for generation in generations:
        check(engine, generation)
    assert len(list(company)) == 6
    assert company.prompt_logprobs == []


def test_a_cached_prompt_is_scored_again(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=300)
    for _ in range(2):
        generation = engine.generate(PROMPTS[0], params())
        list(generation)
        check(engine, generation)
        assert generation.timing.reused_tokens == 0


def test_no_token_may_be_asked_for(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=300, prefill_chunk=32)
    generation = engine.generate(PROMPTS[0], params(max_tokens=0))
    assert list(generation) == []
    assert generation.finish_reason == "length"
    check(engine, generation)
    assert engine.idle
    assert engine.load.pages_used == 0
    with pytest.raises(RequestError, match="max_tokens"):
        params(max_tokens=0, prompt_logprobs=None)


def test_preemption_scores_nothing_twice(make_engine, data):
    engine = make_engine(data / "qwen1-plain", max_context=200, cache_tokens=320, prefill_chunk=24)
    prompts = [[(i * 31 + j * j) % 150 for j in range(60 + i)] for i in range(6)]
    generations = [engine.generate(ids, params(max_tokens=80)) for ids in prompts]
    for generation in generations:
        generation.start()
    for generation in generations:
        list(generation)
        check(engine, generation)
    assert engine.scheduler.preemptions > 0


def test_a_prompt_that_breaks_the_numbers_ends_alone(make_engine, data):
    import dataclasses

    engine = make_engine(data / "qwen1-plain", max_context=300, prefill_chunk=32)
    weights = engine.decoder.embed_tokens.clone()
    weights[77] = torch.nan
    engine.decoder = dataclasses.replace(engine.decoder, embed_tokens=weights)
    bad = engine.generate([1, 2, 77, 3], params())
    good = engine.generate([i % 70 for i in range(40)], params())
    bad.start()
    assert len(list(good)) == 6
    with pytest.raises(NumericsError, match="embedding"):
        next(bad)
