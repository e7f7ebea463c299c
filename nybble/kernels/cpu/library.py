"""The C functions as Python sees them: structures, argument types, element kinds."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from nybble.config import KV_BITS
from nybble.kernels.cpu import compile

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the enum of simd.h
CACHE_KINDS = {kind: number for number, kind in enumerate(KV_BITS)}  # the same
NO_SUCH_SLOT, BAD_BATCH = -2, -3  # the enum of cache.h

_long, _int, _float, _pointer = ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("words", "scales", "zeros", "bias", "perm")),
        *((name, _long) for name in ("inputs", "outputs", "rows", "groups", "blocks_per_group")),
        ("bits", _int),
        ("scale_kind", _int),
    )


class Dense(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("weight", "bias")),
        *((name, _long) for name in ("inputs", "outputs")),
        ("kind", _int),
    )


class Cache(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, _long) for name in ("num_pages", "kv_heads", "page_size", "dim")),
        ("kind", _int),
    )


class Rope(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("q", "k", "v", "cos", "sin", "rotated", "slots")),
        *((name, _long) for name in ("q_stride", "k_stride", "v_stride", "tokens", "q_heads")),
        ("cache", Cache),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("q", "out", "lse", "pages", "starts", "lengths")),
        *((name, _long) for name in ("tokens", "sequences", "page_stride", "most_pages", "group")),
        ("cache", Cache),
        ("scale", _float),
        ("closed", _int),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "nybble_isa": (ctypes.c_char_p, []),
    "nybble_quant_linear": (_int, [_pointer, _pointer, _long, _pointer, _int]),
    "nybble_dense_linear": (None, [_pointer, _pointer, _long, _pointer, _int]),
    "nybble_rms_norm": (None, [_pointer, _pointer, _int, _float, _long, _long, _pointer, _int]),
    "nybble_silu_mul": (None, [_pointer, _long, _long, _pointer, _int]),
    "nybble_merge_attention": (None, [*4 * [_pointer], _long, _long, _pointer, _int]),
    "nybble_rope_store": (_int, [_pointer, _int]),
    "nybble_attention": (_int, [_pointer, _int]),
}


@dataclass(frozen=True)
class Library:
    """The loaded kernels. Pointers are not checked here: the backend checks the tensors."""

    isa: str
    quant_linear: Any
    dense_linear: Any
    rms_norm: Any
    silu_mul: Any
    merge_attention: Any
    rope_store: Any
    attention: Any

    @classmethod
    def load(cls, extra: tuple[str, ...] = ()) -> Library:
        """Raises compile.BuildError where no compiler can make them."""
        dll = compile.load(extra)
        functions = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(dll, name)
            function.restype, function.argtypes = result, arguments
            functions[name.removeprefix("nybble_")] = function
        return cls(isa=functions.pop("isa")().decode(), **functions)
