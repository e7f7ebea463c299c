from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.cache.sizes import bytes_per_token, seat_bytes
from nybble.cache.store import KVStore, _tensors, one_sequence, open_step
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
    store = KVStore(shape, kind, 3, CPU, seats=2)
    seats = 2 * seat_bytes(shape, kind)
    size = sum(tensor.nbytes for layer in store.layers for tensor in _tensors(layer))
    assert size == 3 * 64 * bytes_per_token(shape, kind) + seats
    assert (seats > 0) == (kind == "int4")
    assert len(store.layers) == 2
    assert store.layers[0].head_dim == head_dim


@pytest.mark.parametrize("kind", ["float16", "int6", "int4"])
def test_growing_keeps_the_pages(kind):
    store = KVStore(config(), kind, 2, CPU)
    for layer in store.layers:
        if layer.seats is not None:
            layer.seats.keys.fill_(2)
        layer.keys.fill_(3)
        layer.values.fill_(5)
        if layer.value_scales is not None:
            layer.value_scales.fill_(7)
    grown = store.grown(5)
    assert grown.num_pages == 5
    for old, new in zip(store.layers, grown.layers, strict=True):
        assert torch.equal(new.keys[:2], old.keys)
        assert torch.equal(new.values[:2], old.values)
        assert new.seats is None or torch.equal(new.seats.keys, old.seats.keys)
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


SPANS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 200)).map(lambda s: (s[0], s[0] + s[1])),
    min_size=1,
    max_size=5,
)


@given(SPANS, st.randoms(use_true_random=False))
def test_an_open_step_names_each_tokens_place_in_its_own_page(spans, random):
    seats = random.sample(range(8), len(spans))
    step = open_step(spans, seats, 64, CPU)
    batch, alone = step.batch, all(end - begin == 1 for begin, end in spans)
    positions = [p for begin, end in spans for p in range(begin, end)]
    assert [slot % 64 for slot in batch.slots.tolist()] == [p % 64 for p in positions]
    rows = list(pairwise(batch.starts.tolist()))
    assert rows[-1][1] == len(positions)
    assert batch.max_query == max(b - a for a, b in rows)
    for (first, last), length, page in zip(rows, batch.lengths, batch.pages, strict=True):
        own = {positions[row] // 64 for row in range(first, last)}
        assert len(own) == 1  # a stretch stays within a page
        assert length == positions[last - 1] % 64 + 1
        assert {slot // 64 for slot in batch.slots[first:last].tolist()} == {int(page[0])}
    if alone:
        assert batch.pages[:, 0].tolist() == seats
        assert step.loads is None
        assert step.keeps is None
        return
    assert batch.pages[:, 0].tolist() == list(range(batch.sequences))
    first_pages = [batch.slots[row] // 64 for row in starts_of(spans)]
    last_pages = [batch.slots[row - 1] // 64 for row in starts_of(spans, ends=True)]
    loads = [
        (seat, int(p)) for (b, _), seat, p in zip(spans, seats, first_pages, strict=True) if b % 64
    ]
    keeps = [
        (int(p), seat) for (_, e), seat, p in zip(spans, seats, last_pages, strict=True) if e % 64
    ]
    assert pairs(step.loads) == loads
    assert pairs(step.keeps) == keeps


def starts_of(spans, ends=False):
    counts = [end - begin for begin, end in spans]
    return list(accumulate(counts)) if ends else [0, *accumulate(counts)][:-1]


def pairs(copies):
    return [] if copies is None else [tuple(map(int, pair)) for pair in zip(*copies, strict=True)]
