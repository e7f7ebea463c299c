"""Random models must compute as real ones do: no value may overflow or die out on the way."""

from __future__ import annotations

import dataclasses

import torch

from nybble.bench.shapes import SHAPES, random_decoder
from nybble.cache.store import KVStore, one_sequence
from nybble.kernels.ref import RefBackend
from nybble.model.decoder import Step
from nybble.model.rope import make_positions


def test_a_deep_random_model_keeps_its_numbers_in_range():
    config = dataclasses.replace(
        SHAPES["qwen-72b-int4"],
        hidden_size=512,
        num_layers=16,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=4096,
        vocab_size=100,
    )
    backend = RefBackend(dtype=torch.float16)
    decoder = random_decoder(config, backend)
    store = KVStore(config, "float16", 1, backend.device)
    batch = one_sequence(0, 20, store.page_size, backend.device)
    step = Step(make_positions(config, 1.0, 20, backend.device), batch, store.layers)
    sizes = [float(x.float().std()) for _, x in decoder.trace(torch.arange(20), step)]
    assert len(sizes) == config.num_layers + 2  # the embedding, the head
    assert all(0.3 < size < 50 for size in sizes)
