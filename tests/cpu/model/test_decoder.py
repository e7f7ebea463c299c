"""The last block works on the rows whose logits are wanted, and they are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged import make_batch

from nybble.cache.store import KVStore
from nybble.kernels.backend import Backend
from nybble.model.decoder import Step
from nybble.model.rope import make_positions


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize("new", [[70], [1, 40, 3], [5, 1]])
def test_logits_after_the_last_tokens_are_those_of_all_rows(make_engine, data, kind, new):
    decoder = make_engine(data / "qwen1-ntk-logn").decoder
    batch, pages = make_batch(new, [0] * len(new), 64)
    spans = [(0, count) for count in new]
    ids = torch.arange(sum(new)) % 90
    positions = make_positions(decoder.config, 1.0, max(new), torch.device("cpu"))
    rows = torch.cat([torch.arange(count) for count in new])

    def logits(wanted: torch.Tensor | None) -> torch.Tensor:
        store = KVStore(decoder.config, kind, pages, torch.device("cpu"), seats=len(new))
        step = store.opened(batch, spans, list(range(len(new))))
        return decoder.forward(ids, Step(positions.take(rows), step, store.layers), wanted)

    every = logits(torch.arange(len(ids)))
    torch.testing.assert_close(logits(None), every[batch.ends.long()], atol=1e-5, rtol=1e-5)


class InAnOrderOfItsOwn:
    """A backend whose attention leaves its reader what nothing in between can use."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def attention(self, *arguments, reader):
        return [self.inner.attention(*arguments)]


def only_reader(linear):
    return lambda x: linear(x[0] if isinstance(x, list) else x)


@pytest.mark.parametrize("kind", ["float32", "int4"])
def test_nothing_comes_between_attention_and_its_reader(make_engine, data, kind):
    """Be it the last block, LogN or open pages, which have no reader."""
    decoder = make_engine(data / "qwen1-ntk-logn").decoder
    layers = tuple(replace(one, o_proj=only_reader(one.o_proj)) for one in decoder.layers)
    other = replace(decoder, backend=InAnOrderOfItsOwn(decoder.backend), layers=layers)
    batch, pages = make_batch([70], [0], 64)
    positions = make_positions(decoder.config, 1.0, 70, torch.device("cpu"))
    ids = torch.arange(70)
    results = []
    for one in (decoder, other):
        store = KVStore(decoder.config, kind, pages, torch.device("cpu"), seats=1)
        step = store.opened(batch, [(0, 70)], [0])
        results.append(one.forward(ids, Step(positions, step, store.layers)))
    assert torch.equal(*results)
