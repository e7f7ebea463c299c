"""Runs a list of tokens by itself, outside the batch, on pages of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nybble.cache.sizes import PAGE_SIZE
from nybble.cache.store import KVStore, one_sequence
from nybble.engine.scheduler import LOGIT_ROWS
from nybble.model.decoder import Decoder, Step
from nybble.model.rope import make_positions


def logits(
    decoder: Decoder, ids: list[int], kind: str, alpha: float, prefill_chunk: int
) -> torch.Tensor:
    """fp32 (tokens, vocab): the model's prediction after each token."""
    steps = _steps(decoder, ids, kind, alpha, prefill_chunk)
    return torch.cat([decoder.forward(chunk, step, _every(chunk)) for chunk, step in steps])


def first_nonfinite(
    decoder: Decoder, ids: list[int], kind: str, alpha: float, prefill_chunk: int
) -> str | None:
    """The part of the model whose output is the first that is not finite, if any is not."""
    for chunk, step in _steps(decoder, ids, kind, alpha, prefill_chunk):
        for name, values in decoder.trace(chunk, step):
            if not bool(torch.isfinite(values).all()):
                return name
    return None


def _every(chunk: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(chunk), device=chunk.device)


def _steps(
    decoder: Decoder, ids: list[int], kind: str, alpha: float, prefill_chunk: int
) -> Iterator[tuple[torch.Tensor, Step]]:
    """The chunks of `ids`, so that memory stays bounded; each step rests on those before it."""
    device = decoder.backend.device
    store = KVStore(decoder.config, kind, -(-len(ids) // PAGE_SIZE), device)
    positions = make_positions(decoder.config, alpha, len(ids), device)
    size = min(prefill_chunk, LOGIT_ROWS)
    for begin in range(0, len(ids), size):
        chunk = ids[begin : begin + size]
        batch = one_sequence(begin, len(chunk), PAGE_SIZE, device)
        at = positions.slice(begin, begin + len(chunk))
        batch = store.opened(batch, [(begin, begin + len(chunk))], [0])
        yield torch.tensor(chunk, device=device), Step(at, batch, store.layers)
