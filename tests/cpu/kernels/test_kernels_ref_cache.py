"""The reference's cache and attention against formulas written a second time, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import fill, make_batch, make_layer, whole

from nybble.errors import ConfigError
from nybble.kernels import ref_cache
from nybble.kernels.backend import KV_DTYPES, Batch, KVLayer
from nybble.kernels.ref import RefBackend

KINDS = list(KV_DTYPES)
REF = RefBackend()


def dense_attention(q, keys, values, scale):
    """The last len(q) tokens of one sequence; keys, values (length, kv_heads, dim)."""
    q, keys, values = (np.asarray(x, dtype=np.float64) for x in (q, keys, values))
    tokens, heads, dim = q.shape
    out = np.zeros((tokens, heads, dim))
    for i in range(tokens):
        seen = len(keys) - tokens + i + 1
        for h in range(heads):
            kv = h // (heads // keys.shape[1])
            weights = np.exp(keys[:seen, kv] @ q[i, h] * scale)
            out[i, h] = weights @ values[:seen, kv] / weights.sum()
    return out.reshape(tokens, -1)


@pytest.mark.parametrize("page_size", [32, 64])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_over_pages_is_a_dense_softmax(page_size, group):
    new, past = [1, 5, 1, 30], [70, 64, 0, 3]
    batch, pages = make_batch(new, past, page_size)
    all_tokens = whole(batch, page_size)
    layer = make_layer("float32", pages, 2, 16, page_size)
    k, v = torch.randn(2, int(all_tokens.starts[-1]), 2, 16)
    fill(REF, layer, all_tokens, k, v)
    q = torch.randn(sum(new), 2 * group, 16)
    got = REF.attention(q, layer, batch, 0.3)
    for s, (n, length) in enumerate(zip(new, batch.lengths.tolist(), strict=True)):
        rows = slice(int(batch.starts[s]), int(batch.starts[s]) + n)
        first = int(all_tokens.starts[s])
        expected = dense_attention(q[rows], *(x[first : first + length] for x in (k, v)), 0.3)
        np.testing.assert_allclose(got[rows].numpy(), expected, atol=1e-5)


def test_rope_turns_pairs_by_their_angle():
    q, angle = torch.randn(2, 3, 8), torch.rand(2, 4)
    batch, pages = make_batch([2], [1])
    layer = make_layer("float32", pages, 3, 8)
    turned = REF.rope_store(q, q, q, angle.cos(), angle.sin(), layer, batch)
    pairs = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones(2, 4), angle)[:, None]
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1))
    torch.testing.assert_close(layer.keys[1, :, 1:3], turned.transpose(0, 1))
    torch.testing.assert_close(layer.values[1, :, 1:3], q.transpose(0, 1))
    assert int(layer.keys.isfinite().sum()) == 2 * 3 * 8  # nothing else was written


@pytest.mark.parametrize("dim", [2, 6, 16, 80, 128])
def test_hadamard_is_orthogonal_and_spreads_an_outlier(dim):
    matrix = ref_cache.hadamard(torch.eye(dim))
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim))
    block = dim & -dim
    expected = 1.0 if block == 2 else block**-0.5
    torch.testing.assert_close(matrix[0].abs().max(), torch.tensor(expected))


@settings(max_examples=30, deadline=None)
@given(
    dim=st.sampled_from([8, 16, 64, 80, 128]),
    kind=st.sampled_from(["int8", "int6", "int4"]),
    exponent=st.integers(-3, 3),
    offset=st.sampled_from([0.0, 5.0]),
)
def test_values_come_back_within_half_a_step(dim, kind, exponent, offset):
    x = (torch.randn(3, 2, dim) + offset) * 10.0**exponent
    layer = make_layer(kind, 2, 2, dim)
    batch, _ = make_batch([3], [4])
    ref_cache.store(layer.values, layer.value_scales, kind, batch.slots, x)
    got = ref_cache.dequantize(kind, layer.values, layer.value_scales)[1, :, 4:7].transpose(0, 1)
    for first in range(0, dim, 64 if kind == "int4" else dim):
        piece = slice(first, first + (64 if kind == "int4" else dim))
        part = x[..., piece]
        if kind != "int4":
            step = part.abs().amax(-1, keepdim=True) / {"int8": 127, "int6": 31}[kind]
        else:
            step = (part.amax(-1, keepdim=True) - part.amin(-1, keepdim=True)) / 15
        # Beside half a step: fp16's rounding of step and low, relative and subnormal.
        slack = part.abs().amax(-1, keepdim=True) * 2**-9 + 1e-6
        assert ((got[..., piece] - part).abs() <= step / 2 + slack).all()


def test_int4_stands_in_the_declared_nibbles():
    x = torch.arange(16.0).expand(1, 1, 16) * 0.5 - 3
    layer, (batch, _) = make_layer("int4", 2, 1, 16), make_batch([1], [0])
    ref_cache.store(layer.values, layer.value_scales, "int4", batch.slots, x)
    codes = layer.values[1, 0, 0]
    assert codes.tolist() == [2 * i | (2 * i + 1) << 4 for i in range(8)]
    assert layer.value_scales[1, 0, 0].tolist() == [[0.5, -3.0]]


def test_int6_stands_in_the_declared_nibbles_and_crumbs():
    x = torch.arange(-31.0, 32.0, 2.0).expand(1, 1, 32) / 4
    layer, (batch, _) = make_layer("int6", 2, 1, 32), make_batch([1], [0])
    ref_cache.store(layer.values, layer.value_scales, "int6", batch.slots, x)
    codes = list(range(1, 64, 2))  # with 32 added
    nibbles = [a % 16 | b % 16 << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)]
    crumbs = [
        sum((code >> 4) << 2 * j for j, code in enumerate(codes[i : i + 4]))
        for i in range(0, 32, 4)
    ]
    assert layer.values[1, 0, 0].tolist() == nibbles + crumbs
    assert layer.value_scales[1, 0, 0] == 0.25


def test_int6_needs_whole_bytes():
    with pytest.raises(ConfigError, match="int8"):
        make_layer("int6", 2, 1, 6)


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
def test_zeros_and_vanishing_values_come_back_as_such(kind):
    x = torch.zeros(2, 1, 64)
    x[1] = torch.randn(64) * 1e-9  # below fp16's smallest number
    layer, (batch, _) = make_layer(kind, 2, 1), make_batch([2], [0])
    ref_cache.store(layer.values, layer.value_scales, kind, batch.slots, x)
    got = ref_cache.dequantize(kind, layer.values, layer.value_scales)[1, 0, :2]
    assert not got.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_never_becomes_a_number(kind, bad):
    x = torch.rand(1, 1, 64)
    x[0, 0, 5] = bad
    layer, (batch, _) = make_layer(kind, 2, 1), make_batch([1], [0])
    ref_cache.store(layer.values, layer.value_scales, kind, batch.slots, x)
    got = ref_cache.dequantize(kind, layer.values, layer.value_scales)[1, 0, 0]
    assert not got[5].isfinite()


@pytest.mark.parametrize(
    ("kind", "error"), [("float16", 1e-3), ("int8", 0.02), ("int6", 0.06), ("int4", 0.25)]
)
def test_rotated_keys_and_queries_meet(kind, error):
    """q . k survives the rotation, and a channel of outliers does not drown the others."""
    batch, pages = make_batch([40], [0])
    layer = make_layer(kind, pages, 1)
    q, k, v = torch.randn(3, 40, 1, 64)
    k[..., 7] += 20
    angle = torch.zeros(40, 32)
    turned = REF.rope_store(q, k, v, angle.cos(), angle.sin(), layer, batch)
    keys, _ = ref_cache.gather(layer, batch.pages[0], 40)
    got, expected = turned[:, 0] @ keys[0].t(), q[:, 0] @ k[:, 0].t()
    assert float((got - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "int2"}, "int2"),
        ({"kind": "float16"}, "alike"),
        ({"values": torch.zeros(2, 2, 32, 32)}, "alike"),
        ({"keys": torch.zeros(2, 2, 64, 32).transpose(2, 3)}, "dense"),
        ({"key_scales": torch.zeros(2, 2, 32)}, "scales"),
    ],
)
def test_a_layer_that_is_not_what_it_says_is_refused(change, match):
    parts = {name: torch.zeros(2, 2, 32, 64) for name in ("keys", "values")}
    with pytest.raises(ConfigError, match=match):
        KVLayer(**{"kind": "float32", **parts, **change})


def test_pages_are_of_a_multiple_of_32():
    with pytest.raises(ConfigError, match="multiple of 32"):
        KVLayer("float32", *torch.zeros(2, 2, 2, 48, 64))


def test_scales_have_their_dtype():
    codes = torch.zeros(2, 2, 2, 32, 64, dtype=torch.int8)
    with pytest.raises(ConfigError, match="float16"):
        KVLayer("int8", *codes, *torch.zeros(2, 2, 2, 32))


def test_a_batch_is_of_int32():
    good = [torch.zeros(1), torch.zeros(1, 1), torch.zeros(2), torch.zeros(1)]
    with pytest.raises(ConfigError, match="int32"):
        Batch(*good, 1, 1)
    with pytest.raises(ConfigError, match="a sequence"):
        Batch(*(x.int() for x in (*good[:2], torch.zeros(3), good[3])), 1, 1)
