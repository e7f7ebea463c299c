"""Norm, activation and dense products in C against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.errors import ConfigError

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
