"""The one form in which quantised matrices reach the kernels, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantMatrix:
    """A quantised linear map y = x W, W of shape (K inputs, N outputs).

    W[k, n] = scales[k // group_size, n] * (code[k, n] - zeros[k // group_size, n])

    words:  int32 (ceil(K / pack), N), pack = 32 // bits; code k of output n stands in word
            k // pack at bit bits * (k % pack), little end first (the GPTQ layout).
    scales: float (G, N), G = ceil(K / group_size), in the dtype of the file.
    zeros:  uint8 (G, N), or None where every zero is 2 ** (bits - 1) (symmetric).
    perm:   int64 (K,) or None. Row k of W takes input perm[k] of x (act-order, sorted by group
            at load); the value `in_features` means a padding row, whose input is 0.
    """

    bits: int
    group_size: int
    in_features: int
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    perm: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """K as stored: in_features, or more where act-order groups had to be padded."""
        return self.in_features if self.perm is None else self.perm.numel()

    @property
    def out_features(self) -> int:
        return self.words.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        parts = (self.words, self.scales, self.zeros, self.perm)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)
