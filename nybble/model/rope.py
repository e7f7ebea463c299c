"""Rotary position embedding and LogN, as the families define them.

Su et al. 2021 (RoPE); Peng et al. 2023 (YaRN); the first Qwen generation's dynamic NTK and LogN
as its original code computes them (docs/long-context.md); Llama 3.1's frequency scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.config import ModelConfig, RopeConfig


def ntk_alpha(prompt_tokens: int, trained_context: int) -> float:
    """By how much dynamic NTK stretches the rotary base.

    The prompt's length alone fixes it, for every token decoded after the prompt too.
    """
    power = math.ceil(math.log2(prompt_tokens / trained_context) + 1)
    return max(2.0**power - 1.0, 1.0)


def inverse_frequencies(rope: RopeConfig, head_dim: int, alpha: float = 1.0) -> torch.Tensor:
    """fp32 (head_dim / 2,): radians a position for each pair of dimensions."""
    theta = rope.theta * alpha ** (head_dim / (head_dim - 2)) if alpha != 1.0 else rope.theta
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "yarn":
        return _yarn(frequencies, rope, head_dim)
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _yarn(frequencies: torch.Tensor, rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Keep fast dimensions, interpolate slow ones, blend between."""

    def dimension_at(rotations: float) -> float:
        ratio = rope.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension_at(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_at(rope.beta_slow)), head_dim - 1)
    span = high - low if high != low else 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / span
    keep = 1 - ramp.clamp(0, 1)
    return frequencies / rope.factor * (1 - keep) + frequencies * keep


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Divide long wavelengths by `factor`, keep short ones, blend between."""
    turns = rope.original_context * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


@dataclass(frozen=True)
class Positions:
    """Per-position factors: of the positions of one sequence, or of the tokens of a step.

    cos, sin: fp32 (positions, head_dim / 2). query_scale: fp32 (positions, 1, 1), LogN, or None.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None

    def slice(self, start: int, stop: int) -> Positions:
        scale = None if self.query_scale is None else self.query_scale[start:stop]
        return Positions(self.cos[start:stop], self.sin[start:stop], scale)

    def take(self, rows: torch.Tensor) -> Positions:
        """The factors of rows (tokens,), in that order."""
        scale = None if self.query_scale is None else self.query_scale[rows]
        return Positions(self.cos[rows], self.sin[rows], scale)

    @staticmethod
    def joined(parts: Sequence[Positions]) -> Positions:
        """One after the other; either all have a query_scale or none has."""
        scales = [part.query_scale for part in parts if part.query_scale is not None]
        return Positions(
            torch.cat([part.cos for part in parts]),
            torch.cat([part.sin for part in parts]),
            torch.cat(scales) if scales else None,
        )


def make_positions(
    config: ModelConfig, alpha: float, length: int, device: torch.device
) -> Positions:
    """The factors of the first `length` positions; alpha: see `ntk_alpha`, 1 without it."""
    frequencies = inverse_frequencies(config.rope, config.head_dim, alpha)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    scale = config.rope.attention_factor
    query_scale = None
    if config.logn and length > config.trained_context:
        position = torch.arange(1, length + 1, dtype=torch.float32)
        query_scale = (position.log() / math.log(config.trained_context)).clamp(min=1.0)
        query_scale = query_scale.to(device)[:, None, None]
    return Positions(
        (angles.cos() * scale).to(device), (angles.sin() * scale).to(device), query_scale
    )
