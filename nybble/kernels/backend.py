"""What a device must be able to do for the decoder: the contract every kernel set fulfils."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from nybble.kernels.matrix import QuantMatrix

LinearFn = Callable[[torch.Tensor], torch.Tensor]
"""(tokens, K) -> (tokens, N): a matrix, packed for one kernel, ready to be multiplied with."""


@dataclass(frozen=True)
class Choice:
    """Which kernel was chosen for a matrix, and why the faster ones were refused."""

    kernel: str
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((self.kernel, *(f"  not {reason}" for reason in self.refused)))


class Backend(Protocol):
    """The operations of one decoder step. Tokens are flat: (tokens, ...), one row a token."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Of activations, norms and biases: fp32 on the CPU."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x (..., dim), weight (dim,); the mean square in fp32. Zhang and Sennrich 2019."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(tokens, 2 * width), gate first -> silu(gate) * up, (tokens, width)."""
        ...

    def rope_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
    ) -> torch.Tensor:
        """Rotate q and k (half-split form) and store k and v in the cache from slot `start`.

        q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), possibly views with
        a row stride; cos and sin fp32 (tokens, head_dim / 2); keys and values (kv_heads, slots,
        head_dim) of the cache's dtype. Returns the rotated q, contiguous; k is left as it was.
        """
        ...

    def attention(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: int,
        scale: float,
    ) -> torch.Tensor:
        """Causal attention of the last `tokens` of `length` positions over slots 0 .. length-1.

        q (tokens, heads, head_dim) -> (tokens, heads * head_dim). Query i sees the slots up to
        length - tokens + i. Softmax in fp32.
        """
        ...

    def quant_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        """Pack a quantised matrix for the fastest kernel that takes it."""
        ...

    def choose(self, matrix: QuantMatrix) -> Choice:
        """Which kernel quant_linear takes for a matrix of this kind, and why not a faster one."""
        ...

    def dense_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFn:
        """Pack an unquantised matrix, weight (N, K), bias (N,) or None."""
        ...

    def head_linear(self, weight: torch.Tensor, exact: bool = False) -> LinearFn:
        """The output head, weight (vocab, K): read whole for every token, so worth its own form.

        It may be kept in 8 bits where the weights have 16, unless `exact`.
        """
        ...
