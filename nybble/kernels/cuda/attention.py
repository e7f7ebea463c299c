"""Attention over a paged cache: its writes, one new token a sequence, and many new tokens."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from functools import cache

import torch

from nybble.config import KV_BITS
from nybble.errors import CapacityError, ConfigError
from nybble.kernels.backend import Batch, KVLayer, Partial
from nybble.kernels.cuda.arranged import arranged, rows_of
from nybble.kernels.cuda.launch import Kernel, kernel, pointers

HEAD_DIMS = (64, 128)
KINDS = {"float16": 16, "bfloat16": 17, "int8": 8, "int6": 6, "int4": 4}  # KV of attention.cuh

_LOG2_E = math.log2(math.e)
_KEY_GROUP = 64  # kGroup of attention.cuh
_HEADS = 8  # query heads of a decode block
_UNITS = 1 << 16  # most (sequence, tile of heads) pairs of a step
_QUERIES, _KEYS = 128, 64  # of a prefill block and its tiles
_FEW_KEYS = 32  # of a tile where shared memory is short
_ROPE_WARPS = 8
_STATIC_SHARED = 1024  # what a kernel declares itself, and more


class _Cache(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in ("pages", "starts", "lengths")),
        *((name, ctypes.c_int) for name in ("page_stride", "kv_heads")),
    )


class _DecodeArguments(ctypes.Structure):
    _fields_ = (
        ("cache", _Cache),
        *((name, ctypes.c_void_p) for name in ("q", "out", "parts", "finished")),
        *((name, ctypes.c_int) for name in ("heads", "head_tiles", "splits")),
        ("scale", ctypes.c_float),
        ("lse", ctypes.c_void_p),  # here and below: beyond what kernels without PARTIAL take
    )


class _PrefillArguments(ctypes.Structure):
    _fields_ = (
        ("cache", _Cache),
        *((name, ctypes.c_void_p) for name in ("q", "out")),
        *((name, ctypes.c_int) for name in ("heads", "query_tiles")),
        ("scale", ctypes.c_float),
        ("out_rows", ctypes.c_int),  # of attention_hopper.cu; padding elsewhere
        ("lse", ctypes.c_void_p),
    )


class _RopeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cos", "sin", "slots", "q_out")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_long) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv_heads")),
    )


@dataclass(frozen=True)
class _Results:
    """What a call writes, (tokens, heads * head_dim) and (tokens, heads): see partial.cuh.

    out may be arranged (arranged.cuh) where attention_hopper.cu alone writes it.
    """

    out: torch.Tensor
    lse: torch.Tensor | None = None
    closed: bool = False

    def defines(self) -> dict[str, int]:
        return {"PARTIAL": int(self.lse is not None), "CLOSED": int(self.closed)}


@dataclass(frozen=True)
class DecodePlan:
    """Compile-time shape of attention_decode.cu; its opening comment says what the names mean.

    min_blocks: blocks that run on a multiprocessor at a time.
    """

    tile: int
    stages: int = 3
    warps: int = 4
    min_blocks: int = 3

    def defines(self) -> dict[str, int]:
        return {
            "TILE": self.tile,
            "STAGES": self.stages,
            "WARPS": self.warps,
            "MIN_BLOCKS": self.min_blocks,
        }

    def shared_bytes(self, kind: str, head_dim: int) -> int:
        """kStageBytes of attention_decode.cu, for every warp and stage."""
        row = row_bytes(kind, head_dim)
        if kind == "int8":
            key_padding = 0 if row % 128 else 64
        elif kind == "int6":
            key_padding = 96 - row
        elif kind == "int4":
            key_padding = 0 if row % 64 else 32
        else:
            key_padding = 16
        padding = key_padding + (0 if row % 64 == 48 else 16)
        stage = self.tile * (2 * row + padding + 2 * _scale_bytes(kind, head_dim))
        return self.warps * self.stages * stage

    def fitted(self, kind: str, head_dim: int, limit: int) -> DecodePlan:
        """The plan with as many of its stages as `limit` bytes of shared memory hold."""
        if self.stages > 2 and self.shared_bytes(kind, head_dim) > limit:
            return replace(self, stages=self.stages - 1).fitted(kind, head_dim, limit)
        return self


# Measured on an H100: docs/decisions/006-gpu-attention.md.
DECODE_PLANS = {
    "float16": DecodePlan(tile=16, min_blocks=2),
    "bfloat16": DecodePlan(tile=16, min_blocks=2),
    "int8": DecodePlan(tile=32, stages=2, min_blocks=2),
    "int6": DecodePlan(tile=32, stages=2, min_blocks=4),
    "int4": DecodePlan(tile=32),
}


def row_bytes(kind: str, head_dim: int) -> int:
    """Bytes of one head's key or value, without scales."""
    return head_dim * KV_BITS[kind] // 8


def _scale_bytes(kind: str, head_dim: int) -> int:
    return {"int8": 2, "int6": 2, "int4": 4 * (head_dim // _KEY_GROUP)}.get(kind, 0)


def _code_bytes(kind: str, head_dim: int) -> int:
    """Of a tile of keys and values as they stand in the cache, where they have to be widened."""
    scales = _scale_bytes(kind, head_dim)
    return 2 * _KEYS * (row_bytes(kind, head_dim) + scales) if scales else 0


def prefill_tile(kind: str, head_dim: int, limit: int) -> tuple[int, int]:
    """Keys of a tile of attention_prefill.cu, and its shared memory, of which there is `limit`."""
    codes = _code_bytes(kind, head_dim)
    buffers = 1 if codes else 2

    def shared_bytes(keys: int) -> int:
        return (_QUERIES + 2 * buffers * keys) * (head_dim * 2 + 16) + codes

    keys = _KEYS if codes or shared_bytes(_KEYS) <= limit else _FEW_KEYS
    return keys, shared_bytes(keys)


def _hopper_bytes(kind: str, head_dim: int) -> int:
    """Shared memory of attention_hopper.cu: its stages, and two tiles of codes."""
    codes = _code_bytes(kind, head_dim)
    stages = 3 if codes else 4
    return stages * 2 * _KEYS * head_dim * 2 + 2 * codes


@cache
def split_count(units: int, most_tiles: int, places: int) -> int:
    """Into how many parts the keys of each unit are split, so that `places` blocks are busy.

    units: (sequence, tile of heads) pairs; most_tiles: of keys, of the longest sequence, in
    portions worth a block of their own.
    """
    most = max(1, min(most_tiles, 2 * places // max(units, 1)))

    def time(splits: int) -> float:
        return math.ceil(units * splits / places) / splits + 0.002 * splits

    return min(range(1, most + 1), key=time)


class PagedAttention:
    """The kernels of one device. Activations are fp16 or bf16, caches any of KINDS.

    All launches go to torch's current stream and read no device value on the host, so they can be
    captured in a CUDA graph once one call with the same kind of cache was made. Two streams must
    not run attention of one instance at the same time: its parts are counted in one place.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        plans: dict[str, DecodePlan] | None = None,
        dependent: bool | None = None,
        hopper: bool | None = None,
    ) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device, self.dtype = device, dtype
        self._plans = DECODE_PLANS if plans is None else plans
        self._multiprocessors = properties.multi_processor_count
        self._shared = properties.shared_memory_per_multiprocessor
        block_shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self._block_shared = block_shared - _STATIC_SHARED
        self._dependent = properties.major >= 9 if dependent is None else dependent
        self._hopper = properties.major == 9 if hopper is None else hopper
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._finished = torch.zeros(_UNITS, dtype=torch.int32, device=device)

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
        """See Backend.rope_store."""
        self._check(q, layer)
        q, k, v = (_heads_in_a_row(x) for x in (q, k, v))
        tokens, heads, head_dim = q.shape
        out = torch.empty(tokens, heads, head_dim, dtype=self.dtype, device=self.device)
        if tokens == 0:
            return out
        arguments = _RopeArguments(
            *pointers(q, k, v, cos.contiguous(), sin.contiguous(), batch.slots, out),
            *pointers(layer.keys, layer.values, layer.key_scales, layer.value_scales),
            *(q.stride(0), k.stride(0), v.stride(0)),
            *(tokens, heads, k.shape[1]),
        )
        blocks = -(-tokens * (heads + 2 * k.shape[1]) // _ROPE_WARPS)
        run = self._kernel("rope_store", layer, {})
        run.launch((blocks, 1), 32 * _ROPE_WARPS, arguments, dependent=self._dependent)
        return out

    def __call__(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, arranged_rows: int = 0
    ) -> torch.Tensor:
        """See Backend.attention. arranged_rows: the result may be arranged, in so many rows."""
        q, prompt = q.to(self.dtype), batch.max_query > 1 and batch.sequences == 1
        if arranged_rows and prompt and self._on_hopper(q):
            out = arranged(q.shape[0], q.shape[1] * q.shape[2], arranged_rows, q)
        else:
            out = torch.empty(q.flatten(1).shape, dtype=self.dtype, device=self.device)
        self._attend(q, layer, batch, scale, _Results(out))
        return out

    def partial(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, *, closed: bool
    ) -> Partial:
        """See Backend.partial_attention."""
        out = torch.empty(q.flatten(1).shape, dtype=self.dtype, device=self.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=self.device)
        self._attend(q, layer, batch, scale, _Results(out, lse, closed))
        return out, lse

    def _attend(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, results: _Results
    ) -> None:
        q = q.to(self.dtype).contiguous()
        self._check(q, layer)
        if batch.max_query > 1:
            self._prefill(q, layer, batch, scale, results)
        # Each kernel passes over the sequences of the other; one sequence has no other.
        if batch.max_query == 1 or len(batch.lengths) > 1:
            self._decode(q, layer, batch, scale, results)

    def _decode(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, results: _Results
    ) -> None:
        _, heads, head_dim = q.shape
        plan = self._plans[layer.kind].fitted(layer.kind, head_dim, self._block_shared)
        kv_heads, sequences = layer.keys.shape[1], len(batch.lengths)
        head_tiles = -(-(heads // kv_heads) // _HEADS)
        units = sequences * kv_heads * head_tiles
        if units > _UNITS:
            raise CapacityError(
                f"A step of {sequences} sequences is more than the attention kernel counts: "
                f"run at most {_UNITS // (kv_heads * head_tiles)} at a time."
            )
        shared_bytes = plan.shared_bytes(layer.kind, head_dim)
        # Each block of a multiprocessor also takes a kilobyte of the system's.
        held = min(plan.min_blocks, max(1, self._shared // (shared_bytes + 1024)))
        portions = -(-batch.max_length // (2 * plan.warps * plan.tile))
        splits = split_count(units, portions, self._multiprocessors * held)
        parts = torch.empty(
            sequences * heads * splits * (head_dim + 2) if splits > 1 else 1,
            dtype=torch.float32,
            device=self.device,
        )
        arguments = _DecodeArguments(
            _cache_of(layer, batch),
            *pointers(q, results.out, parts, self._finished),
            *(heads, head_tiles, splits, scale * _LOG2_E),
            *pointers(results.lse),
        )
        defines = {**plan.defines(), **results.defines()}
        run = self._kernel("attention_decode", layer, defines, shared_bytes)
        run.launch((units * splits, 1), 32 * plan.warps, arguments, dependent=self._dependent)

    def _prefill(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, results: _Results
    ) -> None:
        _, heads, head_dim = q.shape
        query_tiles = -(-batch.max_query // _QUERIES)
        arguments = _PrefillArguments(
            _cache_of(layer, batch),
            *pointers(q, results.out),
            *(heads, query_tiles, scale * _LOG2_E),
            rows_of(results.out) if results.out.dim() == 3 else 0,
            *pointers(results.lse),
        )
        defines = results.defines()
        if self._on_hopper(q):
            name, threads = "attention_hopper", 384
            shared_bytes = _hopper_bytes(layer.kind, head_dim)
        else:
            name, threads = "attention_prefill", 128
            tile, shared_bytes = prefill_tile(layer.kind, head_dim, self._block_shared)
            defines["TILE"] = tile
        run = self._kernel(name, layer, defines, shared_bytes)
        blocks = query_tiles * heads * len(batch.lengths)
        run.launch((blocks, 1), threads, arguments, dependent=self._dependent)

    def _on_hopper(self, q: torch.Tensor) -> bool:
        return self._hopper and q.shape[-1] == 128  # attention_hopper.cu says why

    def _check(self, q: torch.Tensor, layer: KVLayer) -> None:
        if q.shape[-1] not in HEAD_DIMS:
            raise ConfigError(
                f"The CUDA attention takes heads of {' or '.join(map(str, HEAD_DIMS))} "
                f"dimensions, not {q.shape[-1]}: run this model with the 'ref' kernels."
            )
        if layer.kind not in KINDS:
            raise ConfigError(
                f"The CUDA attention takes a cache of {', '.join(KINDS)}, not {layer.kind}: "
                "choose another --kv-dtype."
            )
        if q.dtype != self.dtype or layer.keys.device != q.device or q.device != self.device:
            raise ConfigError(
                f"The CUDA attention takes {self.dtype} on {self.device}, got {q.dtype} on "
                f"{q.device} and a cache on {layer.keys.device}: convert them."
            )

    def _kernel(
        self, name: str, layer: KVLayer, extra: dict[str, int], shared_bytes: int = 0
    ) -> Kernel:
        key = name, layer.kind, layer.head_dim, layer.page_size, shared_bytes, *extra.items()
        if key not in self._kernels:
            defines = {
                "KV": KINDS[layer.kind],
                "BF16": int(self.dtype == torch.bfloat16),
                "HEAD_DIM": layer.head_dim,
                "PAGE": layer.page_size,
                **extra,
            }
            items = tuple(sorted(defines.items()))
            self._kernels[key] = kernel(f"{name}.cu", name, items, self.device, shared_bytes)
        return self._kernels[key]


def _cache_of(layer: KVLayer, batch: Batch) -> _Cache:
    return _Cache(
        *pointers(layer.keys, layer.values, layer.key_scales, layer.value_scales),
        *pointers(batch.pages, batch.starts, batch.lengths),
        *(batch.pages.stride(0), layer.keys.shape[1]),
    )


def _heads_in_a_row(x: torch.Tensor) -> torch.Tensor:
    """x (tokens, heads, head_dim), copied unless the heads of a token lie behind one another."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
