"""The last block works on the rows whose logits are wanted, and they are the same."""

from __future__ import annotations

import pytest
import torch
from paged import make_batch

from nybble.cache.store import KVStore
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
