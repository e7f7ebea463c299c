"""Attention over a cache with open pages: the own page in 16 bits, those before it as codes.

Errors of four bits do harm where attention is strong, and that is among the last tokens. So what
stands in the page that a sequence is filling is also kept in 16 bits, in a seat of its own in every
layer. Which page is a token's own follows from its position alone: how a prompt is cut, and what
else is in the batch, changes nothing. docs/decisions/005 has what this brings.
"""

from __future__ import annotations

import torch

from nybble.errors import ConfigError
from nybble.kernels.backend import Backend, Batch, KVLayer


def attention(
    backend: Backend,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotary: tuple[torch.Tensor, torch.Tensor],
    layer: KVLayer,
    batch: Batch,
    scale: float,
    query_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """rope_store and attention of a layer with seats; query_scale multiplies the rotated queries.

    Shapes as Backend.rope_store has them. The batch has an `open_step`.
    """
    step = batch.open_step
    if step is None or layer.seats is None:
        raise ConfigError("a cache with open pages needs seats, and batches that name them.")
    pages = layer.seats if step.pages is None else step.pages
    if step.loads is not None:
        _copy(layer.seats, pages, *step.loads)
    parts = []
    for cache, where, closed in ((layer, batch, True), (pages, step.batch, False)):
        q = backend.rope_store(*qkv, *rotary, cache, where)
        if query_scale is not None:
            q = (q * query_scale).to(q.dtype)
        parts.append(backend.partial_attention(q, cache, where, scale, closed=closed))
    if step.keeps is not None:
        _copy(pages, layer.seats, *step.keeps)
    return backend.merge_attention(*parts)


def _copy(source: KVLayer, target: KVLayer, first: torch.Tensor, second: torch.Tensor) -> None:
    """Whole pages, first[i] of `source` to second[i] of `target`."""
    target.keys[second] = source.keys[first]
    target.values[second] = source.values[first]
