"""What a device must be able to do for the decoder: the contract every kernel set fulfils."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from nybble.config import KV_BITS, KV_GROUP
from nybble.errors import ConfigError
from nybble.kernels.matrix import QuantMatrix

LinearFn = Callable[[torch.Tensor], torch.Tensor]
"""(tokens, K) -> (tokens, N): a matrix, packed for one kernel, ready to be multiplied with."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over some of the keys, (tokens, heads * head_dim), and its log-sum-exp: ln of the sum
of exp(score) that it was divided by, fp32 (tokens, heads). Zeros and -inf where there is no key."""


@dataclass(frozen=True)
class Choice:
    """Which kernel was chosen for a matrix, and why the faster ones were refused."""

    kernel: str
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((self.kernel, *(f"  not {reason}" for reason in self.refused)))


@dataclass(frozen=True)
class Batch:
    """Which tokens run in one step, and in which cache slots their keys and values stand.

    Tensors are int32, on the backend's device. Position p of sequence s lives in page
    pages[s, p // page_size], slot p % page_size of it. The new tokens of a sequence are its
    last positions.
    """

    slots: torch.Tensor  # (tokens,): page * page_size + offset of each new token
    pages: torch.Tensor  # (sequences, most pages): beyond a sequence's length any valid id
    starts: torch.Tensor  # (sequences + 1,): first row of each sequence, then the tokens in all
    lengths: torch.Tensor  # (sequences,): keys of each sequence, the new ones included
    max_query: int  # most new tokens of one sequence
    max_length: int  # most keys of one sequence, or an upper bound of it
    open_step: OpenStep | None = None  # for a cache with open pages: where these tokens stand there

    def __post_init__(self) -> None:
        tensors = (self.slots, self.pages, self.starts, self.lengths)
        if any(t.dtype is not torch.int32 or t.stride(-1) != 1 for t in tensors):
            raise ConfigError("a batch is described by dense int32 tensors: convert them.")
        if not len(self.starts) - 1 == len(self.lengths) == len(self.pages):
            raise ConfigError("a batch needs one length and one row of pages a sequence.")

    @property
    def sequences(self) -> int:
        return self.lengths.shape[0]

    @property
    def ends(self) -> torch.Tensor:
        """(sequences,): the row of each sequence's last token."""
        return self.starts[1:] - 1

    def of_ends(self) -> Batch:
        """The batch of these rows alone, for attention to what is stored already."""
        starts = torch.arange(len(self.starts), dtype=torch.int32, device=self.starts.device)
        slots = self.slots.index_select(0, self.ends)
        return replace(self, slots=slots, starts=starts, max_query=1, open_step=None)


@dataclass(frozen=True)
class OpenStep:
    """The tokens of a batch in pages of 16 bits: see kernels/open_pages.py.

    batch: the same tokens in the same order, its sequences being stretches that end with a page.
    pages: of these tokens, shared by all layers; None: they stand in the layer's seats themselves.
    loads: (seats, pages) int64, copied from a layer's seats to `pages` before its step; keeps:
    (pages, seats), copied back after it.
    """

    batch: Batch
    pages: KVLayer | None = None
    loads: tuple[torch.Tensor, torch.Tensor] | None = None
    keeps: tuple[torch.Tensor, torch.Tensor] | None = None


KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int6": torch.uint8,
    "int4": torch.uint8,
}
"""The kinds of a cache, and the dtype that holds each."""


@dataclass(frozen=True)
class KVLayer:
    """One layer's cache, in pages; kind is a key of KV_DTYPES.

    keys, values: (pages, kv_heads, page_size, head_dim) in the dtype of the kind.
      int4: (..., head_dim / 2), element 2i in the low nibble of byte i, 2i + 1 in the high one.
      int6: (..., head_dim * 3/4), of code + 32: first the low nibbles of all elements as above,
            then the upper two bits of all, of element 4i + j in bits 2j and 2j + 1 of byte i.
    Scales, fp16, None for float kinds:
      int8, int6: (pages, kv_heads, page_size): x ~ code * scale, scale = largest magnitude
            / 127 or / 31.
      int4: (pages, kv_heads, page_size, groups, 2): per KV_GROUP dimensions (the last group may
            be short) step and low: x ~ code * step + low, step = (max - low) / 15.
    For all of them the keys are stored after the rotation of `ref_cache.hadamard`, and
    rope_store returns q rotated alike, so that q . k is unchanged. Values are not rotated.

    seats, of the kinds in KV_OPEN: pages of 16 bits, one for each running sequence, with what
    stands in its open (last) page; a token sees its own page there and not as codes.
    """

    kind: str
    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    seats: KVLayer | None = None

    def __post_init__(self) -> None:
        if self.kind not in KV_DTYPES:
            raise ConfigError(f"no cache of kind {self.kind!r}: use {', '.join(KV_DTYPES)}.")
        for cache in (self.keys, self.values):
            if cache.dtype is not KV_DTYPES[self.kind] or cache.shape != self.keys.shape:
                raise ConfigError(f"keys and values of kind {self.kind} must be alike.")
            if not cache.is_contiguous() or cache.dim() != 4 or cache.shape[2] % 32:
                raise ConfigError("a cache is dense, in pages of a multiple of 32 slots.")
        shape = scales_shape(self.kind, self.keys.shape[:3], self.head_dim)
        for scales in (self.key_scales, self.value_scales):
            if (None if scales is None else scales.shape) != shape:
                raise ConfigError(f"the scales of a cache of kind {self.kind} need {shape}.")
            if scales is not None and not (
                scales.dtype is torch.float16 and scales.is_contiguous()
            ):
                raise ConfigError("the scales of a cache are dense and float16.")

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[3] * self.keys.itemsize * 8 // KV_BITS[self.kind]

    @property
    def quantized(self) -> bool:
        return not self.kind.endswith(("32", "16"))


def stored_width(kind: str, head_dim: int) -> int:
    """How many numbers of the kind's dtype hold one head's key or value."""
    if kind == "int6" and head_dim % 4:
        raise ConfigError(
            f"Heads of {head_dim} dimensions do not fill the bytes of an int6 cache: use "
            "--kv-dtype int8."
        )
    return head_dim * KV_BITS[kind] // (8 * KV_DTYPES[kind].itemsize)


def scales_shape(kind: str, slots: torch.Size, head_dim: int) -> tuple[int, ...] | None:
    """Of a cache's scales; slots (pages, kv_heads, page_size)."""
    if kind == "int4":
        return (*slots, -(-head_dim // KV_GROUP), 2)
    return tuple(slots) if kind in ("int8", "int6") else None


class Backend(Protocol):
    """The operations of one decoder step. Tokens are flat: (tokens, ...), one row a token."""

    name: str
    device: torch.device
    dtype: torch.dtype
    """Of activations, norms and biases: fp32 on the CPU."""

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of table (vocab, hidden), (tokens, hidden) in `dtype`; ids int64 (tokens,).

        A table in pinned main memory serves kernels that can read it from the GPU.
        """
        ...

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
        layer: KVLayer,
        batch: Batch,
    ) -> torch.Tensor:
        """Rotate q and k (half-split form) and store k and v in the slots of the batch.

        q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), possibly views with
        a row stride; cos and sin fp32 (tokens, head_dim / 2). Returns the rotated q (in the
        basis of the layer's keys), contiguous; k is left as it was.
        """
        ...

    def attention(
        self,
        q: torch.Tensor,
        layer: KVLayer,
        batch: Batch,
        scale: float,
        reader: LinearFn | None = None,
    ) -> torch.Tensor:
        """Causal attention of every sequence over its own keys. Softmax in fp32.

        q (tokens, heads, head_dim) -> (tokens, heads * head_dim). Row i of the n new ones of
        sequence s sees its keys 0 .. lengths[s] - n + i. reader: the only linear that will be
        given the result, which may then be in an order that this one reads faster.
        """
        ...

    def partial_attention(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, *, closed: bool
    ) -> Partial:
        """attention with its log-sum-exp. closed: a row sees only the pages before its own."""
        ...

    def merge_attention(self, first: Partial, second: Partial) -> torch.Tensor:
        """Attention over the keys of both; every row has some in the second."""
        ...

    def quant_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        """Pack a quantised matrix for the fastest kernel that takes it."""
        ...

    def gate_up_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        """quant_linear for a matrix of gate, then up, outputs that only `add_mlp` will use."""
        ...

    def norm_linear(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, linear: LinearFn
    ) -> torch.Tensor:
        """linear(rms_norm(x))."""
        ...

    def add_mlp(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        gate_up: LinearFn,
        down: LinearFn,
    ) -> torch.Tensor:
        """x + down(silu_mul(gate_up(rms_norm(x)))). x may be overwritten."""
        ...

    def add_linear(self, residual: torch.Tensor, linear: LinearFn, x: torch.Tensor) -> torch.Tensor:
        """residual + linear(x), in one pass where the linear can. residual may be overwritten."""
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
