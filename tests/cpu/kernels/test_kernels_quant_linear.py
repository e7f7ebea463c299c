"""The matrix kernel with 8-bit activations: against its own definition, and against fp32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.errors import ConfigError
from nybble.kernels.ref import dequantize, gather_inputs

relaxed = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def rounded_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel documents: 8 bits per 32 inputs, largest magnitude / 127, to nearest.

    Also the step of each input that lies so near to a tie that it may go either way: a fused
    multiply-add rounds the exact product, a separate one a product rounded before.
    """
    rows, width = x.shape
    blocks = torch.nn.functional.pad(x.double(), (0, -width % 32)).view(rows, -1, 32)
    largest = blocks.abs().amax(2, keepdim=True)
    scaled = torch.where(largest < 1e-30, 0.0, blocks * 127 / largest)
    step = largest / 127
    tie = ((scaled - scaled.floor() - 0.5).abs() < 127 * 2**-22) * step
    return (scaled.round() * step).flatten(1)[:, :width], tie.flatten(1)[:, :width]


def assert_equals_definition(matrix, bias, x, got) -> None:
    """Within fp32's rounding of the terms: a sum may cancel."""
    weight = dequantize(matrix).double()
    rounded, tie = rounded_activations(gather_inputs(x, matrix))
    expected = rounded @ weight + bias.double()
    size = rounded.abs() @ weight.abs() + bias.double().abs()
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= 1e-6 * size + tie @ weight.abs()).all()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@relaxed
@given(
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 70),
    rows=st.integers(1, 19),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 96, 128, 1000]),
    asymmetric=st.booleans(),
    padding=st.sampled_from([0, 0, 5, 40]),
    act_order=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_equals_its_definition(cpu, make_matrix, rows, seed, **shape):
    torch.manual_seed(seed)
    matrix = make_matrix(**shape)
    assert cpu.choose(matrix).kernel == "c-int8-activations"
    x, bias = torch.randn(rows, matrix.in_features), torch.randn(matrix.out_features)
    assert_equals_definition(matrix, bias, x, cpu.quant_linear(matrix, bias)(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_many_rows_and_no_row(cpu, make_matrix, bits, asymmetric):
    matrix = make_matrix(96, 200, bits, 32, asymmetric)
    linear, bias = cpu.quant_linear(matrix, None), torch.zeros(200)
    x = torch.randn(150, 96)
    assert_equals_definition(matrix, bias, x, linear(x))
    assert linear(x[:0]).shape == (0, 200)


@relaxed
@given(rows=st.integers(2, 80), start=st.integers(0, 79), bits=st.sampled_from([4, 8]))
def test_a_row_does_not_depend_on_its_batch(cpu, make_matrix, rows, start, bits):
    matrix = make_matrix(200, 50, bits, 64, asymmetric=True)
    linear, x = cpu.quant_linear(matrix, torch.randn(50)), torch.randn(rows, 200)
    whole = linear(x)
    first = start % rows
    assert torch.equal(linear(x[first:]), whole[first:])
    assert torch.equal(linear(x[first : first + 1]), whole[first : first + 1])


def test_the_thread_count_does_not_matter(native, make_matrix):
    linear, x = native.quant_linear(make_matrix(128, 333), None), torch.randn(70, 128)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append((linear(x), linear(x[:1])))
    finally:
        torch.set_num_threads(before)
    for many, one in outputs[1:]:
        assert torch.equal(many, outputs[0][0])
        assert torch.equal(one, outputs[0][1])


@pytest.mark.parametrize("bits", [4, 8])
def test_error_of_gaussian_inputs_is_below_one_percent(native, ref, make_matrix, bits):
    matrix, x = make_matrix(1024, 256, bits, 128), torch.randn(32, 1024)
    fine = ref.quant_linear(matrix, None)(x)
    assert relative(native.quant_linear(matrix, None)(x), fine.double()) < 0.008


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_an_outlier_costs_no_more_than_its_block(cpu, ref, make_matrix, size):
    """Its 31 neighbours are rounded in steps of size / 127, whose standard error is known."""
    matrix, x = make_matrix(512, 64), torch.randn(16, 512)
    x[:, 100] = size
    fine, got = ref.quant_linear(matrix, None)(x), cpu.quant_linear(matrix, None)(x)
    assert torch.isfinite(got).all()
    neighbours = min(31**0.5 * size / 127 / 12**0.5, 31**0.5)  # at most all of them are lost
    assert relative(got, fine.double()) < 1.5 * neighbours / float(x[0].double().norm()) + 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_bad_input_spoils_its_whole_row_and_no_other(cpu, make_matrix, bad, bits, asymmetric):
    linear = cpu.quant_linear(make_matrix(100, 40, bits, 64, asymmetric), torch.ones(40))
    x = torch.randn(13, 100)
    clean = linear(x)
    x[5, 97] = bad
    got = linear(x)
    assert not torch.isfinite(got[5]).any()
    assert torch.equal(got[:5], clean[:5])
    assert torch.equal(got[6:], clean[6:])
    assert not torch.isfinite(linear(x[5:6])).any()


def test_zero_rows_give_the_bias(cpu, make_matrix):
    bias = torch.randn(40)
    got = cpu.quant_linear(make_matrix(100, 40), bias)(torch.zeros(3, 100))
    assert torch.equal(got, bias.expand(3, 40))


def test_views_and_other_dtypes_are_copied(native, make_matrix):
    linear = native.quant_linear(make_matrix(64, 40), None)
    wide = torch.randn(6, 128)
    assert torch.equal(linear(wide[:, 64:]), linear(wide[:, 64:].contiguous()))
    assert torch.equal(linear(wide[::2, :64]), linear(wide[::2, :64].contiguous()))
    half = wide[:, :64].half()
    assert torch.equal(linear(half), linear(half.float()))


def test_a_wrong_width_is_refused(native, make_matrix):
    linear = native.quant_linear(make_matrix(64, 40), None)
    with pytest.raises(ConfigError, match="rows of 64"):
        linear(torch.randn(2, 65))
    with pytest.raises(ConfigError, match="rows of 64"):
        linear(torch.empty(2, 64, device="meta"))


def test_an_odd_group_size_runs_exactly(native, ref, make_matrix):
    matrix, x = make_matrix(100, 40, group_size=20), torch.randn(3, 100)
    choice = native.choose(matrix)
    assert choice.kernel == "ref"
    assert "multiple of 32" in choice.refused[0]
    got = native.quant_linear(matrix, None)(x)
    assert torch.equal(got, ref.quant_linear(matrix, None)(x))
