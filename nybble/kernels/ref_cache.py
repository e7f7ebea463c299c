"""The reference's cache: how keys and values are rotated, rounded, put in pages and read back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nybble.config import KV_GROUP
from nybble.kernels.backend import Batch, KVLayer


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply blocks of the last dimension with the normalised Walsh-Hadamard matrix.

    It spreads a channel's outliers over its block and is its own inverse. Blocks are as large as
    a power of two can be; with blocks of 2 x stays as it is. Ashkboos et al. 2024 (QuaRot).
    """
    block = x.shape[-1] & -x.shape[-1]
    if block <= 2:
        return x
    matrix = torch.ones(1, 1, device=x.device)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    blocks = x.reshape(*x.shape[:-1], -1, block)
    return torch.matmul(blocks, matrix * block**-0.5).flatten(-2)


def store(
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    kind: str,
    slots: torch.Tensor,
    x: torch.Tensor,
) -> None:
    """Put x fp32 (tokens, kv_heads, head_dim) into the slots int32 (tokens,) of a cache."""
    page_size = cache.shape[2]
    page, offset = slots.long() // page_size, slots.long() % page_size
    if scales is None:
        cache[page, :, offset] = x.to(cache.dtype)
        return
    codes, steps = _QUANTIZE[kind](x)
    cache[page, :, offset], scales[page, :, offset] = codes, steps


def sequences(
    layer: KVLayer, batch: Batch
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each sequence: its rows, their positions, and its keys and values as `gather` has them."""
    starts = batch.starts.tolist()
    for s, length in enumerate(batch.lengths.tolist()):
        rows = slice(starts[s], starts[s + 1])
        new = starts[s + 1] - starts[s]
        positions = torch.arange(length - new, length, device=layer.keys.device)
        yield rows, positions, *gather(layer, batch.pages[s], length)


def gather(layer: KVLayer, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's keys and values, fp32 (kv_heads, length, head_dim), from its pages (most,)."""
    used = pages[: -(-length // layer.page_size)].long()

    def rows(cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        x = dequantize(layer.kind, cache[used], None if scales is None else scales[used])
        return x.transpose(0, 1).flatten(1, 2)[:, :length]

    return rows(layer.keys, layer.key_scales), rows(layer.values, layer.value_scales)


def dequantize(kind: str, cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """Slots of a cache (..., stored_width) -> fp32 (..., head_dim)."""
    x = unpack(kind, cache).float()
    if scales is None:
        return x
    if kind != "int4":
        return x * scales.float().unsqueeze(-1)
    step, low = scales.float().repeat_interleave(KV_GROUP, -2)[..., : x.shape[-1], :].unbind(-1)
    return x * step + low


def unpack(kind: str, cache: torch.Tensor) -> torch.Tensor:
    """Slots of a cache (..., stored_width) -> codes, one an element, (..., head_dim)."""
    if kind == "int4":
        return _split(cache, 4)
    if kind != "int6":
        return cache
    nibbles, crumbs = cache.tensor_split((cache.shape[-1] * 2 // 3,), -1)
    return (_split(nibbles, 4) | _split(crumbs, 2) << 4).to(torch.int8) - 32


def _split(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (..., n) -> (..., n * 8 / bits): the parts of each byte, from its low end."""
    return torch.stack([packed >> at & 2**bits - 1 for at in range(0, 8, bits)], -1).flatten(-2)


def _join(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of _split."""
    parts = [codes[..., at :: 8 // bits] << at * bits for at in range(8 // bits)]
    return torch.stack(parts).sum(0, dtype=torch.uint8)


def _quantize_symmetric(x: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of -most to most, int8, and a scale a head."""
    scales = (x.abs().amax(-1) / most).to(torch.float16)
    return _round(x, scales.unsqueeze(-1)).clamp(-most, most).to(torch.int8), scales


def _quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_symmetric(x, 127)


def _quantize_int6(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The low nibbles of all codes, then their upper two bits."""
    codes, scales = _quantize_symmetric(x, 31)
    shifted = (codes + 32).to(torch.uint8)
    return torch.cat((_join(shifted & 15, 4), _join(shifted >> 4, 2)), -1), scales


def _quantize_int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes a byte, and (step, low) per group."""
    dim, groups = x.shape[-1], -(-x.shape[-1] // KV_GROUP)
    # The short group is filled up with its last element, which changes neither end of it.
    last = x[..., -1:].expand(*x.shape[:-1], groups * KV_GROUP - dim)
    grouped = torch.cat((x, last), -1).view(*x.shape[:-1], groups, KV_GROUP)
    low, top = grouped.amin(-1), grouped.amax(-1)
    scales = torch.stack((((top - low) / 15), low), -1).to(torch.float16)
    step, low = scales.unsqueeze(-2).unbind(-1)
    codes = _round(grouped - low.float(), step).clamp(0, 15).to(torch.uint8).flatten(-2)
    return _join(codes[..., :dim], 4), scales


def _round(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """x / step to the nearest integer; 0 where the step vanished or is no number."""
    return torch.where(step > 0, x / step.float(), 0.0).round().nan_to_num(0.0)


_QUANTIZE = {"int8": _quantize_int8, "int6": _quantize_int6, "int4": _quantize_int4}
