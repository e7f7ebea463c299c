"""RoPE, the cache and attention in C against the reference: every kind, mixed batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from paged import copy_layer, fill, make_batch, make_layer, whole

from nybble.errors import CapacityError, ConfigError
from nybble.kernels import ref_cache
from nybble.kernels.backend import KV_DTYPES

relaxed = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KINDS = list(KV_DTYPES)
kinds = st.sampled_from(KINDS)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Splitting work among threads is a matter of their number, not of this machine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def read(layer, part):
    scales = layer.key_scales if part == "keys" else layer.value_scales
    return ref_cache.dequantize(layer.kind, getattr(layer, part), scales)


@relaxed
@given(
    new=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    half=st.one_of(st.integers(1, 40), st.sampled_from([8, 32, 40, 64])),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    page_size=st.sampled_from([32, 64]),
    kind=kinds,
)
def test_rope_store(cpu, ref, new, half, kv_heads, group, page_size, kind):
    assume(kind != "int6" or half % 2 == 0)  # whole bytes
    dim, heads, tokens = 2 * half, kv_heads * group, sum(new)
    past = [7 * i for i in range(len(new))]
    batch, pages = make_batch(new, past, page_size, seed=half)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    angle, before = torch.rand(tokens, half) * 7, qkv.clone()
    layers = [make_layer(kind, pages, kv_heads, dim, page_size) for _ in "ab"]
    got, expected = (
        backend.rope_store(q, k, v, angle.cos(), angle.sin(), layer, batch)
        for backend, layer in zip((cpu, ref), layers, strict=True)
    )
    assert torch.equal(qkv, before)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        *(read(layer, "values") for layer in layers), atol=0, rtol=0, equal_nan=True
    )
    # A key on the edge of two codes may fall to either side: one step, or fp16's last bit.
    step = {"int8": 0.06, "int6": 0.25, "int4": 0.7}.get(kind, 1e-6)
    relative = {"float16": 1e-3, "bfloat16": 8e-3}.get(kind, 1e-6)
    keys = [read(layer, "keys") for layer in layers]
    torch.testing.assert_close(*keys, atol=step, rtol=relative, equal_nan=True)
    assert ((keys[0] - keys[1]).nan_to_num().abs() > 1e-2).sum() <= 2


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_storing_rounds_every_value_as_torch_does(cpu, kind):
    """All exponents, subnormals, ties, overflow, Inf and NaN."""
    mantissas = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000]
    )
    bits = (torch.arange(256)[:, None] << 23) | torch.cat((mantissas, mantissas + 0x7E0000))
    values = bits.to(torch.int32).view(torch.float32).flatten()
    values = torch.cat((values, -values)).view(-1, 1, 64)  # 256 * 20 * 2 of them
    batch, pages = make_batch([len(values)], [0])
    layer = make_layer(kind, pages, 1)
    fill(cpu, layer, batch, torch.zeros_like(values), values)
    _, stored = ref_cache.gather(layer, batch.pages[0], len(values))
    expected = values[:, 0].to(KV_DTYPES[kind]).float()
    torch.testing.assert_close(stored[0], expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_rounding_at_the_ends(cpu, ref, kind, dim):
    """Zeros, numbers that fp16 cannot hold, Inf and NaN: as the reference has them."""
    x = torch.randn(8, 1, dim)
    x[0], x[1] = 0, x[1] * 1e-9
    x[2], x[3] = x[2] * 1e-6, x[3] * 1e9
    x[4, 0, 3], x[5, 0, 3], x[6, 0, 3] = torch.nan, torch.inf, -torch.inf
    batch, pages = make_batch([8], [0])
    layers = [make_layer(kind, pages, 1, dim) for _ in "ab"]
    for backend, layer in zip((cpu, ref), layers, strict=True):
        fill(backend, layer, batch, torch.zeros_like(x), x)
    got, expected = (ref_cache.gather(layer, batch.pages[0], 8)[1][0] for layer in layers)
    assert torch.equal(got[:3], expected[:3])
    assert torch.equal(got[7], expected[7])
    for values in (got, expected):
        assert not values[3:7, 3].isfinite().any()


@relaxed
@given(
    sequences=st.lists(
        st.tuples(st.one_of(st.just(1), st.integers(1, 70)), st.integers(0, 300)),
        min_size=1,
        max_size=5,
    ),
    dim=st.sampled_from([16, 24, 64, 80, 128]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5]),
    page_size=st.sampled_from([32, 64, 96]),
    kind=kinds,
)
def test_attention(cpu, ref, sequences, dim, kv_heads, group, page_size, kind):
    new, past = zip(*sequences, strict=True)
    batch, pages = make_batch(new, past, page_size)
    every = whole(batch, page_size)
    layer = make_layer(kind, pages, kv_heads, dim, page_size)
    fill(ref, layer, every, *torch.randn(2, int(every.starts[-1]), kv_heads, dim))
    q = torch.randn(sum(new), kv_heads * group, dim)
    got = cpu.attention(q, layer, batch, dim**-0.5)
    torch.testing.assert_close(got, ref.attention(q, layer, batch, dim**-0.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3])
def test_a_row_does_not_depend_on_its_batch(native, threads, group, kind):
    """Alone or among others, in one go or in chunks: the same bits."""
    lengths, kv_heads = [700, 200, 1, 90], 2
    batch, pages = make_batch(lengths, [0] * 4)
    layer = make_layer(kind, pages, kv_heads)
    fill(native, layer, batch, *torch.randn(2, sum(lengths), kv_heads, 64))
    q = torch.randn(sum(lengths), kv_heads * group, 64)
    full = native.attention(q, layer, batch, 0.125)
    for last in ([1, 1, 1, 1], [3, 150, 1, 1], [1, 40, 1, 90]):
        past = [length - n for length, n in zip(lengths, last, strict=True)]
        step, _ = make_batch(last, past)
        stops = batch.starts[1:].tolist()
        rows = torch.cat([torch.arange(s - n, s) for s, n in zip(stops, last, strict=True)])
        got = native.attention(q[rows], layer, step, 0.125)
        assert torch.equal(got, full[rows])
        for s, n in enumerate(last):
            alone = replace(
                step,
                pages=step.pages[s : s + 1],
                starts=torch.tensor([0, n], dtype=torch.int32),
                lengths=step.lengths[s : s + 1],
            )
            mine = rows[sum(last[:s]) : sum(last[: s + 1])]
            assert torch.equal(native.attention(q[mine], layer, alone, 0.125), full[mine])


def test_attention_over_extreme_scores(cpu, ref):
    batch, pages = make_batch([4], [196])
    every, layer = whole(batch), make_layer("float32", pages, 1)
    k, v = torch.randn(2, 200, 1, 64)
    k[:130] *= 1e-3
    fill(ref, layer, every, k, v)
    q = torch.randn(4, 2, 64) * 1e3
    got, expected = (backend.attention(q, layer, batch, 1.0) for backend in (cpu, ref))
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    fill(ref, layer, every, torch.full_like(k, 1e18), v)
    far, (one, _) = torch.full((1, 1, 64), -1e18), make_batch([1], [199])
    torch.testing.assert_close(cpu.attention(far, layer, one, 1.0), v.mean(0))


@pytest.mark.parametrize("kind", ["float32", "int8", "int6", "int4"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [1, 60])
def test_attention_shows_bad_values(cpu, where, bad, tokens, kind):
    batch, pages = make_batch([tokens], [140 - tokens])
    q = torch.rand(tokens, 2, 64) + 0.1
    k, v = torch.rand(2, 140, 1, 64) + 0.1
    {"q": q, "k": k, "v": v}[where][0, 0, 3] = bad
    layer = make_layer(kind, pages, 1)
    fill(cpu, layer, whole(batch), k, v)
    assert not torch.isfinite(cpu.attention(q, layer, batch, 0.1)[0]).all()


def test_a_bad_sequence_harms_no_other(native):
    batch, pages = make_batch([1, 1], [50, 300])
    layer = make_layer("float16", pages, 1)
    every = whole(batch)
    k, v = torch.randn(2, int(every.starts[-1]), 1, 64)
    k[20] = torch.nan
    fill(native, layer, every, k, v)
    got = native.attention(torch.randn(2, 1, 64), layer, batch, 0.1)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


def test_attention_refuses_what_does_not_fit(native):
    batch, pages = make_batch([5], [90])
    q, layer = torch.randn(5, 4, 64), make_layer("float32", pages)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.attention(q, make_layer("float32", pages - 1), batch, 1.0)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.attention(q, layer, replace(batch, pages=batch.pages - 9), 1.0)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.attention(q, layer, replace(batch, lengths=batch.lengths + 32), 1.0)
    with pytest.raises(ConfigError, match="own row and key"):
        native.attention(q, layer, replace(batch, lengths=batch.lengths - 91), 1.0)
    with pytest.raises(ConfigError, match="own row and key"):
        native.attention(q[:4], layer, batch, 1.0)
    with pytest.raises(ConfigError, match="multiple of 2"):
        native.attention(q[:, :3], layer, batch, 1.0)
    with pytest.raises(ConfigError, match="heads of 32"):
        native.attention(q, make_layer("float32", pages, dim=32), batch, 1.0)


def test_rope_store_refuses_what_does_not_fit(native):
    batch, pages = make_batch([5], [30])
    q, turn, layer = torch.randn(5, 2, 64), torch.zeros(5, 32), make_layer("int8", pages)
    before = copy_layer(layer)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.rope_store(q, q, q, turn, turn, layer, replace(batch, slots=batch.slots + 64))
    with pytest.raises(CapacityError, match="not in the cache"):
        native.rope_store(q, q, q, turn, turn, layer, replace(batch, slots=batch.slots - 99))
    with pytest.raises(ConfigError, match="one row a token"):
        native.rope_store(q, q, q, turn[:4], turn[:4], layer, batch)
    with pytest.raises(ConfigError, match="differ in tokens"):
        native.rope_store(q, q, q[:4], turn, turn, layer, batch)
    assert torch.equal(layer.keys, before.keys)
