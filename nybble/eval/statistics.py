"""Intervals around a score, and the estimator of pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
_RESAMPLES = 2000
_FEWEST = 5  # values of a stratum that can be resampled


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval in per cent, and how it was found."""

    low: float
    high: float
    method: str


def wilson(successes: float, n: int) -> Interval:
    """Wilson's score interval of a share (E. B. Wilson, JASA 1927)."""
    if n == 0:
        return Interval(0.0, 100.0, "Wilson")
    share, square = successes / n, _Z * _Z
    centre = (share + square / (2 * n)) / (1 + square / n)
    spread = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # The ends are exact where nothing, or everything, succeeded: rounding shall not show.
    low = 0.0 if successes == 0 else 100 * (centre - spread)
    high = 100.0 if successes == n else 100 * (centre + spread)
    return Interval(low, high, "Wilson")


def bootstrap(strata: Sequence[Sequence[float]]) -> Interval:
    """Percentile bootstrap of the mean of the strata's means; a fixed seed, 2,000 resamples.

    Where resampling would show no spread, because a stratum has few values or all are equal:
    Wilson's interval of that mean, as of a share of all values, which is rather too wide.
    """
    generator = np.random.default_rng(0)
    total = np.zeros(_RESAMPLES)
    filled = [np.asarray(stratum, dtype=float) for stratum in strata if len(stratum)]
    if not filled:
        return Interval(0.0, 100.0, "bootstrap")
    every = np.concatenate(filled)
    if min(map(len, filled)) < _FEWEST or every.min() == every.max():
        mean = sum(float(values.mean()) for values in filled) / len(filled)
        found = wilson(mean * len(every), len(every))
        return Interval(found.low, found.high, "Wilson over the questions")
    for values in filled:
        draws = generator.integers(0, len(values), (_RESAMPLES, len(values)))
        total += values[draws].mean(axis=1)
    low, high = np.percentile(100 * total / len(filled), (2.5, 97.5))
    return Interval(float(low), float(high), "bootstrap")


def mean_interval(scores: Sequence[float]) -> Interval:
    """Wilson's for right-or-wrong scores, the bootstrap's for anything between."""
    if all(score in (0, 1) for score in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap([scores])


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of "one of k samples passes" from n samples (Chen et al. 2021)."""
    if not 0 < k <= n:
        raise ValueError(f"k is {k}: from 1 to {n} samples are at hand.")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
