"""The sampler against plain definitions on a whole sorted vocabulary."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.sampler import Sampler, candidates, draw
from nybble.errors import RequestError
from nybble.sampling import SamplingParams

CPU = torch.device("cpu")


class One:
    """A sampler with a single request."""

    def __init__(self, vocab, prompt, **params):
        self.sampler = Sampler(vocab, CPU)
        self.state = self.sampler.state(SamplingParams(**params), list(prompt))

    def choose(self, logits):
        return self.sampler.choose(logits[None], [self.state])[0]


def sampler(vocab=50, prompt=(), **params):
    return One(vocab, prompt, **params)


def plain_candidates(logits: list[float], params: SamplingParams) -> set[int]:
    """Which ids may be drawn, in plain Python, straight from the definitions."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[: params.top_k] if params.top_k else order
    weights = [math.exp(logits[i] - logits[order[0]]) for i in order]
    total, before, kept = sum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        if params.top_p == 1 or before / total < params.top_p or not kept:
            kept.append((token, weight))
        before += weight
    return {token for token, weight in kept if weight >= params.min_p * kept[0][1]}


SETTINGS = {
    "top_k": st.sampled_from([0, 1, 5, 256, 600]),
    "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    "min_p": st.sampled_from([0.0, 0.1]),
}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([3, 40, 700]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    filters=st.lists(st.fixed_dictionaries(SETTINGS), min_size=1, max_size=3),
)
def test_filters_keep_what_their_definitions_keep(seed, size, spread, filters):
    """Looking at the whole vocabulary; rows with other settings beside change nothing."""
    params = [SamplingParams(**chosen) for chosen in filters if not chosen["top_k"]]
    params += [SamplingParams(**chosen) for chosen in filters if chosen["top_k"]][:1] * (not params)
    look = min(params[0].top_k or size, size)
    generator = torch.manual_seed(seed)
    logits = torch.randn(len(params), size, generator=generator, dtype=torch.float64) * spread
    weights, ids = candidates(torch.softmax(logits, -1), params, look)
    for row, chosen in enumerate(params):
        kept = {int(i) for i, weight in zip(ids[row], weights[row], strict=True) if weight > 0}
        assert kept == plain_candidates(logits[row].tolist(), chosen)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([3, 300, 700]),
    spread=st.sampled_from([0.01, 8.0]),
    filters=st.lists(st.fixed_dictionaries(SETTINGS), min_size=1, max_size=5),
)
def test_rows_are_drawn_as_if_they_were_alone_and_among_the_candidates(seed, size, spread, filters):
    params = [SamplingParams(temperature=0.7, **chosen) for chosen in filters]
    generator = torch.manual_seed(seed)
    logits = torch.randn(len(params), size, generator=generator) * spread
    random = torch.rand(len(params), generator=generator)
    together = draw(logits, params, random)
    for row, chosen in enumerate(params):
        one = slice(row, row + 1)
        assert together[row] == draw(logits[one], [chosen], random[one])[0]
        heated = (logits[row].double() / 0.7).tolist()
        slack = dataclasses.replace(  # fp32 may fall on the other side of a threshold
            chosen, top_p=min(1.0, chosen.top_p + 1e-5), min_p=chosen.min_p * (1 - 1e-5)
        )
        assert int(together[row]) in plain_candidates(heated, slack)


def test_a_flat_distribution_is_drawn_from_as_a_whole():
    """More candidates than the first look finds."""
    random = torch.arange(2000) / 2000
    params = [SamplingParams(top_p=0.9)] * 2000
    tokens = draw(torch.zeros(2000, 1000), params, random)
    assert 895 <= len(set(tokens.tolist())) <= 905
    slope = torch.arange(9000) * -1e-6
    first, last = draw(slope.expand(2, -1), params[:2], torch.tensor([0.0, 1 - 1e-6])).tolist()
    assert first == 0
    assert 8050 <= last <= 8110


def test_the_whole_range_of_random_numbers_gives_tokens_that_may_be_drawn():
    logits = torch.tensor([[9.0, 9.0, -9.0, -50.0]])
    edges = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for params in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}):
        drawn = draw(logits.expand(3, -1), [SamplingParams(**params)] * 3, edges).tolist()
        assert set(drawn) <= {0, 1, 2} if not params.get("min_p") else {0, 1}


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_row_that_is_not_finite_leaves_the_others_their_tokens(params):
    logits = torch.zeros(2, 400)
    logits[0, 7] = 50.0
    logits[1] = torch.nan
    tokens = draw(logits, [SamplingParams(**params)] * 2, torch.tensor([0.5, 0.5]))
    assert tokens[0] == 7
    assert tokens[1] < 400


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    row = sampler(vocab=4, seed=7)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[row.choose(probabilities.log())] += 1
    torch.testing.assert_close(counts / 4000, probabilities, atol=0.03, rtol=0)


def test_temperature_sharpens_and_extremes_stay_finite():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sampler(vocab=3, temperature=1e-30, seed=0).choose(logits) == 1
    assert sampler(vocab=3, temperature=1e-300, seed=0).choose(logits * 1e4) == 1
    assert sampler(vocab=3, temperature=100, seed=0).choose(logits) in (0, 1, 2)


def test_the_same_seed_draws_the_same():
    logits = torch.randn(50, generator=torch.manual_seed(0))
    a, b = sampler(seed=3), sampler(seed=3)
    assert [a.choose(logits) for _ in range(20)] == [b.choose(logits) for _ in range(20)]


def test_a_batch_of_requests_chooses_as_each_would_alone():
    logits = torch.randn(6, 50, generator=torch.manual_seed(0))
    many = [
        {"temperature": 0},
        {"seed": 1, "top_p": 0.8},
        {"seed": 2, "top_k": 5, "frequency_penalty": 1.0},
        {"seed": 3},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"seed": 5, "top_p": 0.8, "min_p": 0.05},
    ]
    alone = [sampler(**params) for params in many]
    states = [sampler(**params).state for params in many]
    for _ in range(10):
        together = Sampler(50, CPU).choose(logits, states)
        assert together == [one.choose(row) for one, row in zip(alone, logits, strict=True)]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 1}, {"top_p": 0.9, "seed": 1}])
def test_padding_ids_never_win(params):
    logits = torch.zeros(60)
    logits[50:] = 100.0
    row = sampler(vocab=50, **params)
    assert all(row.choose(logits) < 50 for _ in range(50))


def test_repetition_penalty_counts_the_prompt_and_the_output():
    logits = torch.tensor([2.0, -1.0, 1.5, 0.1])
    row = sampler(vocab=4, prompt=[0, 1], temperature=0, repetition_penalty=2.0)
    assert row.choose(logits) == 2  # 0 fell to 1.0
    assert row.choose(logits) == 0  # 2 fell to 0.75, 0 stays at 1.0


def test_presence_and_frequency_count_the_output_only():
    logits = torch.tensor([2.0, 1.4])
    row = sampler(vocab=2, prompt=[0, 0, 0], temperature=0, frequency_penalty=0.5)
    assert [row.choose(logits) for _ in range(3)] == [0, 0, 1]
    row = sampler(vocab=2, prompt=[0], temperature=0, presence_penalty=1.0)
    assert [row.choose(logits) for _ in range(3)] == [0, 1, 0]


def test_penalties_are_those_of_the_whole_vocabulary():
    generator = torch.manual_seed(0)
    prompt = [3, 3, 7, 55]  # 55 is padding
    row = sampler(
        prompt=prompt,
        temperature=0,
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.4,
    )
    counts = torch.zeros(50)
    seen = torch.zeros(50, dtype=torch.bool)
    seen[[3, 7]] = True
    for _ in range(60):
        logits = torch.randn(50, generator=generator)
        expected = torch.where(seen, torch.where(logits > 0, logits / 1.3, logits * 1.3), logits)
        expected = expected - 0.4 * counts - 0.7 * (counts > 0)
        assert torch.equal(row.state.change(logits), expected)
        token = row.choose(logits)
        counts[token] += 1
        seen[token] = True


def test_a_new_request_does_not_touch_the_device():
    params = SamplingParams(frequency_penalty=1.0, logit_bias={1: 5.0})
    Sampler(50, torch.device("cuda")).state(params, [1, 2])


def test_a_bias_is_added_to_the_logits():
    logits = torch.tensor([2.0, 1.0, 0.0])
    row = sampler(vocab=3, temperature=0, logit_bias={2: 3.5, 0: -1.5}, frequency_penalty=1.0)
    assert [row.choose(logits) for _ in range(4)] == [2, 2, 2, 1]
    with pytest.raises(RequestError, match="logit_bias"):
        sampler(vocab=3, logit_bias={3: 1.0})


def test_penalties_leave_the_callers_logits_alone():
    logits = torch.tensor([2.0, 1.0])
    sampler(vocab=2, prompt=[0], temperature=0, repetition_penalty=3.0).choose(logits)
    assert logits.tolist() == [2.0, 1.0]


def test_logprobs_are_the_models_own():
    logits = torch.randn(50, generator=torch.manual_seed(0))
    row = sampler(temperature=0.5, seed=0)
    token = row.choose(logits)
    (found,) = row.sampler.logprobs(logits[None], [token], 3)
    expected = torch.log_softmax(logits, 0)
    assert found.logprob == pytest.approx(float(expected[token]))
    assert [i for i, _ in found.top] == expected.topk(3).indices.tolist()
