"""Intervals and pass@k against their definitions."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.eval.statistics import bootstrap, mean_interval, pass_at_k, wilson


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_solve_its_equation(counts):
    successes, n = counts
    interval, share = wilson(successes, n), successes / n
    assert 0 <= interval.low <= 100 * share <= interval.high <= 100
    for end in (interval.low / 100, interval.high / 100):
        if 0 < end < 1:
            deviation = abs(share - end) / math.sqrt(end * (1 - end) / n)
            assert deviation == pytest.approx(1.959964, rel=1e-4)


def test_wilson_of_known_counts():
    # E.g. R: prop.test(106, 164, correct = FALSE)
    interval = wilson(106, 164)
    assert (interval.low, interval.high) == pytest.approx((57.05, 71.55), abs=0.01)
    assert wilson(0, 0).high == 100
    assert wilson(5, 5).high == 100


def test_bootstrap_surrounds_the_mean_and_repeats_itself():
    strata = [[0, 1, 1, 0.25] * 10, [1, 1, 0] * 5]
    interval = bootstrap(strata)
    mean = 100 * (sum(strata[0]) / 40 + sum(strata[1]) / 15) / 2
    assert interval.low < mean < interval.high
    assert interval == bootstrap(strata)
    assert bootstrap([]).method == "bootstrap"


@pytest.mark.parametrize(
    "strata",
    [[[1], [0], [1, 1, 0]], [[1] * 6, [1] * 7], [[0.25] * 20], [[0] * 9], [[0.5]], [[1], [0] * 9]],
)
def test_where_nothing_can_be_resampled_the_interval_has_a_width(strata):
    interval = bootstrap(strata)
    mean = 100 * sum(sum(values) / len(values) for values in strata) / len(strata)
    assert interval.method == "Wilson over the questions"
    assert 0 <= interval.low <= mean <= interval.high <= 100
    assert interval.high - interval.low > 15


def test_the_bootstrap_of_shares_is_near_wilson():
    scores = [1.0] * 300 + [0.0] * 200
    assert mean_interval(scores).method == "Wilson"
    found, expected = bootstrap([scores]), wilson(300, 500)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.7)
    assert mean_interval([0.25, *scores]).method == "bootstrap"


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_counts_the_draws_with_a_pass(n):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * correct + [False] * (n - correct), k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(n, correct, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(n, 0, n + 1)
