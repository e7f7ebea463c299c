"""The sampler against plain definitions on a whole sorted vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.sampler import Sampler, candidates
from nybble.sampling import SamplingParams

CPU = torch.device("cpu")


def sampler(vocab=50, prompt=(), **params):
    return Sampler(SamplingParams(**params), list(prompt), vocab, CPU)


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


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([3, 40, 700]),
    top_k=st.sampled_from([0, 1, 5, 600]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
)
def test_filters_keep_what_their_definitions_keep(seed, size, top_k, top_p, min_p, spread):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.randn(size, generator=torch.manual_seed(seed), dtype=torch.float64) * spread
    _, ids = candidates(logits, params)
    assert set(ids.tolist()) == plain_candidates(logits.tolist(), params)


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draw = sampler(vocab=4, seed=7)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw.choose(probabilities.log())] += 1
    torch.testing.assert_close(counts / 4000, probabilities, atol=0.03, rtol=0)


def test_temperature_sharpens_and_extremes_stay_finite():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sampler(vocab=3, temperature=1e-30, seed=0).choose(logits) == 1
    assert sampler(vocab=3, temperature=1e30, seed=0).choose(logits) in (0, 1, 2)


def test_the_same_seed_draws_the_same():
    logits = torch.randn(50, generator=torch.manual_seed(0))
    a, b = sampler(seed=3), sampler(seed=3)
    assert [a.choose(logits) for _ in range(20)] == [b.choose(logits) for _ in range(20)]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 1}, {"top_p": 0.9, "seed": 1}])
def test_padding_ids_never_win(params):
    logits = torch.zeros(60)
    logits[50:] = 100.0
    draw = sampler(vocab=50, **params)
    assert all(draw.choose(logits) < 50 for _ in range(50))


def test_repetition_penalty_counts_the_prompt_and_the_output():
    logits = torch.tensor([2.0, -1.0, 1.5, 0.1])
    draw = sampler(vocab=4, prompt=[0, 1], temperature=0, repetition_penalty=2.0)
    assert draw.choose(logits) == 2  # 0 fell to 1.0
    assert draw.choose(logits) == 0  # 2 fell to 0.75, 0 stays at 1.0


def test_presence_and_frequency_count_the_output_only():
    logits = torch.tensor([2.0, 1.4])
    draw = sampler(vocab=2, prompt=[0, 0, 0], temperature=0, frequency_penalty=0.5)
    assert [draw.choose(logits) for _ in range(3)] == [0, 0, 1]
    draw = sampler(vocab=2, prompt=[0], temperature=0, presence_penalty=1.0)
    assert [draw.choose(logits) for _ in range(3)] == [0, 1, 0]


def test_penalties_leave_the_callers_logits_alone():
    logits = torch.tensor([2.0, 1.0])
    sampler(vocab=2, prompt=[0], temperature=0, repetition_penalty=3.0).choose(logits)
    assert logits.tolist() == [2.0, 1.0]


def test_logprobs_are_the_models_own():
    logits = torch.randn(50, generator=torch.manual_seed(0))
    draw = sampler(temperature=0.5, logprobs=3, seed=0)
    token = draw.choose(logits)
    found = draw.logprob(logits, token)
    expected = torch.log_softmax(logits, 0)
    assert found.logprob == pytest.approx(float(expected[token]))
    assert [i for i, _ in found.top] == expected.topk(3).indices.tolist()
