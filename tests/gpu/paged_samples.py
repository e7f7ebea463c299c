"""Random steps over a paged cache whose pages are shuffled and whose unused slots are poison."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.kernels import ref_cache
from nybble.kernels.backend import KV_DTYPES, Batch, KVLayer, scales_shape, stored_width

DEVICE = torch.device("cuda")
# Prompts that end and begin on either side of tiles and pages: new tokens and keys of each.
PROMPTS = (
    ([2], [2]),
    ([64], [64]),
    ([65], [65]),
    ([127], [127]),
    ([129], [129]),
    ([200], [200]),
    ([64], [300]),
    ([30], [95]),
    ([500], [777]),
    ([5, 70, 200], [5, 71, 1000]),
)


def make_batch(
    new: list[int], lengths: list[int], *, page_size: int = 64, spare: int = 3, bound: int = 0
) -> Batch:
    """new[s] of lengths[s] tokens are new. Pages in random order, table rows filled up with 0."""
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + spare)[: sum(counts)] + 1  # page 0 belongs to nobody
    table = torch.zeros(len(new), max(counts) + 1, dtype=torch.int32)
    for row, pages in zip(table, order.split(counts), strict=True):
        row[: len(pages)] = pages
    spans = [(length - count, length) for count, length in zip(new, lengths, strict=True)]
    return batch_of(table, spans, page_size=page_size, bound=bound)


def batch_of(
    table: torch.Tensor, spans: Sequence[tuple[int, int]], *, page_size: int = 64, bound: int = 0
) -> Batch:
    """The step in which positions begin to end of each sequence are new; pages as in `table`."""
    slots = []
    for pages, (begin, end) in zip(table.cpu(), spans, strict=True):
        position = torch.arange(begin, end)
        slots.append(pages[position // page_size] * page_size + position % page_size)
    new, lengths = [end - begin for begin, end in spans], [end for _, end in spans]
    return Batch(
        slots=torch.cat(slots).int().to(DEVICE),
        pages=table.to(DEVICE),
        starts=torch.tensor([0, *new]).cumsum(0).int().to(DEVICE),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        max_query=max(new),
        max_length=max(bound, *lengths),
    )


def pages_of(lengths: list[int], page_size: int = 64, spare: int = 3) -> int:
    return sum(-(-length // page_size) for length in lengths) + spare + 1


def empty_layer(
    kind: str, pages: int, kv_heads: int, head_dim: int, *, page_size: int = 64
) -> KVLayer:
    """Every slot holds NaN, or the code 0x77 with a NaN for its scale."""
    slots = torch.Size((pages, kv_heads, page_size))
    dtype = KV_DTYPES[kind]
    fill = torch.nan if dtype.is_floating_point else 0x77
    scales = scales_shape(kind, slots, head_dim)

    def codes() -> torch.Tensor:
        return torch.full((*slots, stored_width(kind, head_dim)), fill, dtype=dtype, device=DEVICE)

    def steps() -> torch.Tensor | None:
        if scales is None:
            return None
        return torch.full(scales, torch.nan, dtype=torch.float16, device=DEVICE)

    return KVLayer(kind, codes(), codes(), steps(), steps())


def fill(layer: KVLayer, batch: Batch, lengths: list[int]) -> None:
    """Random keys and values in every slot that the lengths cover; the others stay poison."""
    page_size = layer.page_size
    for pages, length in zip(batch.pages.long(), lengths, strict=True):
        position = torch.arange(length, device=DEVICE)
        slots = pages[position // page_size] * page_size + position % page_size
        _, k, v = random_qkv(length, 1, layer.kv_heads, layer.head_dim, torch.float32)
        ref_cache.store(layer.keys, layer.key_scales, layer.kind, slots, k)
        ref_cache.store(layer.values, layer.value_scales, layer.kind, slots, v)


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next allocation of this size will get."""
    for _ in range(4):
        torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def clone(layer: KVLayer) -> KVLayer:
    parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    seats = None if layer.seats is None else clone(layer.seats)
    return KVLayer(layer.kind, *(None if part is None else part.clone() for part in parts), seats)


def random_qkv(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Views into one matrix, as a fused projection gives them; keys have an outlier channel."""
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=DEVICE)
    qkv[:, heads : heads + kv_heads, 3] *= 8
    return qkv.to(dtype).split((heads, kv_heads, kv_heads), dim=1)


def random_rotary(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, head_dim // 2, device=DEVICE) * 6.28
    return angles.cos(), angles.sin()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
