"""Caches and batches for tests: shuffled pages, and poison wherever nothing was stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.kernels.backend import KV_DTYPES, Backend, Batch, KVLayer, scales_shape, stored_width


def make_layer(
    kind: str, pages: int, kv_heads: int = 2, dim: int = 64, page_size: int = 32
) -> KVLayer:
    """Never written: every slot reads as NaN (codes: by their scales)."""
    slots = torch.Size((pages, kv_heads, page_size))
    shape = scales_shape(kind, slots, dim)
    fill = 77 if shape else torch.nan
    codes = torch.full((*slots, stored_width(kind, dim)), fill, dtype=KV_DTYPES[kind])
    scales = None if shape is None else torch.full(shape, torch.nan, dtype=torch.float16)
    copies = [None if scales is None else scales.clone() for _ in range(2)]
    return KVLayer(kind, codes, codes.clone(), *copies)


def copy_layer(layer: KVLayer) -> KVLayer:
    parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    return KVLayer(layer.kind, *[None if part is None else part.clone() for part in parts])


def make_batch(
    new: Sequence[int], past: Sequence[int], page_size: int = 32, seed: int = 0
) -> tuple[Batch, int]:
    """Sequences of past[i] + new[i] tokens in shuffled pages, and how many pages that takes.

    Page 0 belongs to nobody; it fills up the rows of the page table.
    """
    lengths = [p + n for p, n in zip(past, new, strict=True)]
    counts = [-(-length // page_size) for length in lengths]
    total = sum(counts) + 1
    order = (torch.randperm(total - 1, generator=torch.manual_seed(seed)) + 1).tolist()
    table = torch.zeros(len(new), max(counts), dtype=torch.int32)
    slots: list[int] = []
    for s, count in enumerate(counts):
        owned, order = order[:count], order[count:]
        table[s, :count] = torch.tensor(owned)
        slots += [
            owned[p // page_size] * page_size + p % page_size for p in range(past[s], lengths[s])
        ]
    starts = torch.tensor([0, *new]).cumsum(0)

    def integers(values: object) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32)

    batch = Batch(
        integers(slots), table, integers(starts), integers(lengths), max(new), max(lengths)
    )
    return batch, total


def whole(batch: Batch, page_size: int = 32, seed: int = 0) -> Batch:
    """The same sequences in the same pages with every one of their tokens new."""
    lengths = batch.lengths.tolist()
    return make_batch(lengths, [0] * len(lengths), page_size, seed)[0]


def fill(backend: Backend, layer: KVLayer, batch: Batch, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store k and v (tokens, kv_heads, head_dim) as they are: rotated by no angle."""
    turn = torch.zeros(len(k), k.shape[2] // 2)
    backend.rope_store(k, k, v, turn + 1, turn, layer, batch)
