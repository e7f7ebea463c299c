"""Where the representable values of a group lie: the search for its scale and zero point.

A group's grid is scale * (code - zero). Among candidates around the plain min-max grid the one
with the smallest weighted rounding error is taken, and its scale then fitted to its codes by
least squares. A symmetric grid reaches one step further on one side (codes 0 to 15 around 8), so
a negative scale is a candidate too: it turns that side to where the longer tail is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nybble.config import QuantConfig

# Fractions of the min-max range. Clipping a few outliers often costs less than coarse steps.
_SHRINKS = tuple(1.0 - 0.04 * step for step in range(13))
_SMALLEST = 2.0**-24  # of all fp16 numbers, the subnormal ones too


def search_grid(
    group: torch.Tensor, weights: torch.Tensor, config: QuantConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each column of `group` (rows, N), both (N,) in its dtype.

    weights (rows,): the cost of a squared error in each row. Scales are fp16 values, never 0;
    zeros are whole numbers.
    """
    top = 2**config.bits - 1
    cost = weights[:, None] / weights.mean()
    weighted = cost * group
    best = torch.full_like(group[0], -torch.inf)
    best_scale, best_zero = torch.ones_like(best), torch.zeros_like(best)
    for scale, zero in _candidates(group, config):
        levels = round_to_grid(group, scale, zero, top).sub_(zero)
        overlap = (weighted * levels).sum(0)
        power = (cost * levels.square_()).sum(0)
        # With its least-squares scale overlap / power, the codes leave |group|^2 less this:
        explained = torch.where(power > 0, overlap.square() / power, 0.0)
        better = explained > best
        best = torch.where(better, explained, best)
        fitted = torch.where(power > 0, overlap / power, scale)
        best_scale = torch.where(better, fitted, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return fp16_scale(best_scale), best_zero


def round_to_grid(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """The code of the nearest grid point, 0 to top, as a float."""
    return (values / scale + zero).round_().clamp_(0, top)


def fp16_scale(scale: torch.Tensor) -> torch.Tensor:
    """The value that a file can hold; none may vanish, or an all-zero group would divide by 0."""
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    limit = torch.finfo(torch.float16).max
    return (sign * scale.abs().clamp(_SMALLEST, limit)).to(torch.float16).to(scale.dtype)


def _candidates(
    group: torch.Tensor, config: QuantConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    top, middle = 2**config.bits - 1, 2 ** (config.bits - 1)
    low, high = group.amin(0).clamp(max=0), group.amax(0).clamp(min=0)
    if not config.sym:
        for shrink in _SHRINKS:
            scale = fp16_scale((high - low) * (shrink / top))
            # A v1 file writes zero - 1, and old readers take a wrapped 0 for 16.
            yield scale, (-low * shrink / scale).round().clamp(1, top)
        return
    zero = torch.full_like(low, middle)
    longest = torch.where(high > -low, -high, -low)  # the longer tail goes to code 0
    for shrink in _SHRINKS:
        yield fp16_scale(longest * (shrink / middle)), zero
    for shrink in _SHRINKS:
        yield fp16_scale(longest.abs() * (shrink / (middle - 0.5))), zero
