from __future__ import annotations

import pytest
import torch

from nybble.cache.sizes import bytes_per_token
from nybble.cache.store import KVStore, one_sequence
from nybble.config import parse_model_config
from nybble.errors import CapacityError
from nybble.kernels.backend import KV_DTYPES

CPU = torch.device("cpu")


def config(layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 16):
    return parse_model_config(
        {
            "model_type": "llama",
            "hidden_size": heads * head_dim,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": 100,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
        }
    )


@pytest.mark.parametrize("kind", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_a_store_weighs_what_it_was_said_to(kind, head_dim):
    shape = config(head_dim=head_dim)
    store = KVStore(shape, kind, 3, CPU, 32)
    assert store.nbytes == 3 * 32 * bytes_per_token(shape, kind)
    assert len(store.layers) == 2
    assert store.layers[0].head_dim == head_dim


@pytest.mark.parametrize("kind", ["float16", "int6", "int4"])
def test_growing_keeps_the_pages(kind):
    store = KVStore(config(), kind, 2, CPU)
    for layer in store.layers:
        layer.keys.fill_(3)
        layer.values.fill_(5)
        if layer.value_scales is not None:
            layer.value_scales.fill_(7)
    grown = store.grown(5)
    assert grown.num_pages == 5
    for old, new in zip(store.layers, grown.layers, strict=True):
        assert torch.equal(new.keys[:2], old.keys)
        assert torch.equal(new.values[:2], old.values)
        if old.value_scales is not None:
            assert torch.equal(new.value_scales[:2], old.value_scales)


def test_too_large_a_store_says_what_to_do():
    with pytest.raises(CapacityError, match="max_context"):
        KVStore(config(80, 64, 64, 128), "float16", 2 * 10**7, CPU)


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 200), (63, 1), (64, 1), (30, 70)])
def test_one_sequence(start, tokens):
    batch = one_sequence(start, tokens, 64, CPU)
    assert batch.slots.tolist() == list(range(start, start + tokens))
    assert batch.starts.tolist() == [0, tokens]
    assert batch.lengths.tolist() == [start + tokens]
    assert batch.pages.tolist() == [list(range((start + tokens + 63) // 64))]
    assert (batch.max_query, batch.max_length) == (tokens, start + tokens)
