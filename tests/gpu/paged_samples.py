"""Random steps over a paged cache whose pages are shuffled and whose unused slots are poison."""

from __future__ import annotations

import torch

from nybble.kernels.backend import KV_DTYPES, Batch, KVLayer, scales_shape, stored_width

DEVICE = torch.device("cuda")


def make_batch(
    new: list[int], lengths: list[int], *, page_size: int = 64, spare: int = 3, bound: int = 0
) -> Batch:
    """new[s] of lengths[s] tokens are new. Pages in random order, table rows filled up with 0."""
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + spare)[: sum(counts)] + 1  # page 0 belongs to nobody
    table = torch.zeros(len(new), max(counts) + 1, dtype=torch.int32)
    for row, pages in zip(table, order.split(counts), strict=True):
        row[: len(pages)] = pages
    slots = []
    for s, (count, length) in enumerate(zip(new, lengths, strict=True)):
        position = torch.arange(length - count, length)
        slots.append(table[s, position // page_size] * page_size + position % page_size)
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


def clone(layer: KVLayer) -> KVLayer:
    parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    return KVLayer(layer.kind, *(None if part is None else part.clone() for part in parts))


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
