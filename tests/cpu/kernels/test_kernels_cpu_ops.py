"""Norm, activation, RoPE, attention and dense products in C against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.errors import CapacityError, ConfigError

relaxed = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@relaxed
@given(rows=st.integers(1, 40), dim=st.integers(1, 1000), dtype=dtypes)
def test_rms_norm(cpu, ref, rows, dim, dtype):
    x, weight = torch.randn(rows, dim) * 3, torch.randn(dim).to(dtype)
    torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5))


def test_rms_norm_of_heads_and_bad_rows(cpu, ref):
    x, weight = torch.randn(3, 4, 64)[:, 1:], torch.randn(64)
    got = cpu.rms_norm(x, weight, 1e-6)
    assert got.shape == x.shape
    torch.testing.assert_close(got, ref.rms_norm(x, weight, 1e-6))
    for bad in (torch.nan, torch.inf):
        row = torch.ones(1, 64)
        row[0, 7] = bad
        assert not torch.isfinite(cpu.rms_norm(row, weight, 1e-6)).all()


@relaxed
@given(rows=st.integers(1, 40), width=st.integers(1, 600))
def test_silu_mul(cpu, ref, rows, width):
    x = torch.randn(rows, 2 * width) * 20
    torch.testing.assert_close(cpu.silu_mul(x), ref.silu_mul(x), atol=1e-5, rtol=2e-6)


def test_silu_mul_at_the_ends(cpu):
    gate = torch.tensor([[-1e4, -100.0, -88.5, 0.0, 100.0, 1e30, torch.nan, torch.inf]])
    got = cpu.silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))[0]
    assert got[:3].abs().max() < 1e-33
    assert got[3:6].tolist() == gate[0, 3:6].tolist()
    assert not torch.isfinite(got[6:]).any()


@relaxed
@given(
    tokens=st.integers(1, 9),
    half=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    start=st.integers(0, 5),
    dtype=dtypes,
)
def test_rope_store(cpu, ref, tokens, half, kv_heads, group, start, dtype):
    dim, heads = 2 * half, kv_heads * group
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    angle = torch.rand(tokens, half) * 7
    caches = [[torch.full((kv_heads, start + tokens + 2, dim), 9.0, dtype=dtype)] * 2 for _ in "ab"]
    caches = [[cache.clone() for cache in pair] for pair in caches]
    before = qkv.clone()
    out = [
        backend.rope_store(q, k, v, angle.cos(), angle.sin(), *pair, start)
        for backend, pair in zip((cpu, ref), caches, strict=True)
    ]
    assert torch.equal(qkv, before)
    assert out[0].is_contiguous()
    torch.testing.assert_close(*out)
    (keys, values), (true_keys, true_values) = caches
    assert torch.equal(values, true_values)
    step = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(keys, true_keys, atol=1e-6, rtol=step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storing_rounds_every_value_as_torch_does(cpu, dtype):
    """All exponents, subnormals, ties, overflow, Inf and NaN."""
    mantissas = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000]
    )
    bits = (torch.arange(256)[:, None] << 23) | torch.cat((mantissas, mantissas + 0x7E0000))
    values = bits.to(torch.int32).view(torch.float32).flatten()
    values = torch.cat((values, -values))  # 256 * 20 * 2
    v = values.view(-1, 1, 64)
    tokens = v.shape[0]
    zeros, turn = torch.zeros_like(v), torch.zeros(tokens, 32)
    keys, stored = torch.zeros(2, 1, tokens, 64, dtype=dtype)
    cpu.rope_store(zeros, zeros, v, turn, turn, keys, stored, 0)
    torch.testing.assert_close(stored.flatten(), values.to(dtype), atol=0, rtol=0, equal_nan=True)


@relaxed
@given(
    tokens=st.integers(1, 150),
    past=st.integers(0, 400),
    dim=st.sampled_from([16, 24, 64, 80, 128]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    dtype=dtypes,
)
def test_attention(cpu, ref, tokens, past, dim, kv_heads, group, dtype):
    length = past + tokens
    q = torch.randn(tokens, kv_heads * group, dim)
    keys, values = torch.randn(2, kv_heads, length + 3, dim).to(dtype)
    keys[:, length:] = values[:, length:] = torch.nan  # never written: must not be read
    got = cpu.attention(q, keys, values, length, dim**-0.5)
    expected = ref.attention(q, keys, values, length, dim**-0.5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_attention_does_not_depend_on_the_chunks(cpu, group):
    length, past = 200, 120
    q, (keys, values) = torch.randn(length - past, 2 * group, 64), torch.randn(2, 2, length, 64)
    whole = cpu.attention(q, keys, values, length, 0.125)
    for size in (1, 3, 40):
        for first in range(0, len(q), size):
            piece = q[first : first + size]
            got = cpu.attention(piece, keys, values, past + first + len(piece), 0.125)
            assert torch.equal(got, whole[first : first + size])


def test_attention_over_extreme_scores(cpu, ref):
    q, (keys, values) = torch.randn(4, 2, 64) * 1e3, torch.randn(2, 1, 200, 64)
    keys[:, :130] *= 1e-3
    got = cpu.attention(q, keys, values, 200, 1.0)
    expected = ref.attention(q, keys, values, 200, 1.0)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    far = torch.full((1, 1, 64), -1e18)
    keys[:] = 1e18
    mean = values[0, :200].mean(0, keepdim=True)
    torch.testing.assert_close(cpu.attention(far, keys, values, 200, 1.0), mean)


@pytest.mark.parametrize("where", ["q", "keys", "values"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [1, 60])
def test_attention_shows_bad_values(cpu, where, bad, tokens):
    tensors = {"q": torch.rand(tokens, 2, 64) + 0.1}
    tensors["keys"], tensors["values"] = torch.rand(2, 1, 140, 64) + 0.1
    tensors[where][0, 0, 3] = bad
    got = cpu.attention(tensors["q"], tensors["keys"], tensors["values"], 140, 0.1)
    assert not torch.isfinite(got[0]).all()


def test_attention_with_a_slot_stride(native, ref):
    big = torch.randn(2, 2, 100, 64)
    keys, values = big[:, :, 10:70]
    q = torch.randn(5, 4, 64)
    got = native.attention(q, keys, values, 60, 0.125)
    torch.testing.assert_close(got, ref.attention(q, keys, values, 60, 0.125))


def test_attention_refuses_what_does_not_fit(native):
    q, cache = torch.randn(5, 4, 64), torch.randn(2, 100, 64)
    with pytest.raises(CapacityError, match="100 slots"):
        native.attention(q, cache, cache, 101, 1.0)
    with pytest.raises(ConfigError, match="own key"):
        native.attention(q, cache, cache, 4, 1.0)
    with pytest.raises(ConfigError, match="heads of 64"):
        native.attention(q, cache, torch.randn(3, 100, 64), 9, 1.0)
    with pytest.raises(ConfigError, match="heads of 64"):
        native.attention(q, cache, cache.half(), 9, 1.0)
    with pytest.raises(ConfigError, match="side by side"):
        native.attention(q, *[torch.randn(2, 64, 100).transpose(1, 2)] * 2, 9, 1.0)
    with pytest.raises(ConfigError, match="side by side"):
        native.attention(q, *[cache.double()] * 2, 9, 1.0)


def test_rope_store_refuses_what_does_not_fit(native):
    q, cache = torch.randn(5, 2, 64), torch.randn(2, 6, 64)
    turn = torch.zeros(5, 32)
    with pytest.raises(CapacityError, match="6 slots"):
        native.rope_store(q, q, q, turn, turn, cache, cache, 2)
    with pytest.raises(ConfigError, match="one row a token"):
        native.rope_store(q, q, q, turn[:4], turn[:4], cache, cache, 0)
    with pytest.raises(ConfigError, match="differ in shape"):
        native.rope_store(q, q, q[:4], turn, turn, cache, cache, 0)


@relaxed
@given(
    outputs=st.integers(1, 30),
    inputs=st.integers(1, 300),
    rows=st.integers(1, 12),
    dtype=dtypes,
    biased=st.booleans(),
)
def test_dense_linear(cpu, ref, outputs, inputs, rows, dtype, biased):
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs)
    bias = torch.randn(outputs) if biased else None
    got, expected = (b.dense_linear(weight, bias)(x) for b in (cpu, ref))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_dense_linear_in_pieces_is_the_same(native, monkeypatch):
    weight, x = torch.randn(50, 64).half(), torch.randn(20, 64)
    linear = native.dense_linear(weight, torch.ones(50))
    whole = linear(x)
    monkeypatch.setattr("nybble.kernels.cpu.backend.CHUNK_BYTES", 4 * 64 * 7)
    torch.testing.assert_close(linear(x), whole)


def test_a_bad_input_shows_in_a_dense_product(cpu):
    linear = cpu.dense_linear(torch.ones(20, 40).half(), None)
    for rows in (1, 20):
        x = torch.ones(rows, 40)
        x[0, 3] = torch.nan
        assert not torch.isfinite(linear(x)[0]).any()


def test_weights_of_other_types_are_refused(native):
    with pytest.raises(ConfigError, match="float64"):
        native.dense_linear(torch.randn(4, 4, dtype=torch.float64), None)


def test_the_head_in_eight_bits(native):
    weight, x = (torch.randn(300, 96) * 0.02).half(), torch.randn(2, 96)
    exact, head = native.head_linear(weight, exact=True)(x), native.head_linear(weight)(x)
    torch.testing.assert_close(exact, x @ weight.float().t())
    assert 0 < (head - exact).norm() / exact.norm() < 0.012
    wide = weight.float()
    assert torch.equal(native.head_linear(wide)(x), native.dense_linear(wide, None)(x))
