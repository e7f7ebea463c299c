"""The CUDA matrix kernels against fp64, on a machine with an NVIDIA GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nybble.errors import ConfigError
from nybble.kernels import ref
from nybble.kernels.cuda import dense as cuda_dense
from nybble.kernels.cuda.linear import CudaLinear
from nybble.kernels.cuda.packing import pack
from nybble.kernels.cuda.plans import ALL_PLANS, HopperPlan, fitted, layout_of
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.matrix import QuantMatrix

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs an NVIDIA GPU of compute capability 8.0 or later",
)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 6e-3}


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def inputs_for(matrix: QuantMatrix, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, matrix.in_features, device=matrix.device).to(dtype)


def product(x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
    return ref.gather_inputs(x.double(), matrix) @ ref.dequantize(matrix).double()


def by_cublas(linear: CudaLinear, x: torch.Tensor) -> torch.Tensor:
    """As other GPUs than Hopper compute long prompts."""
    return linear.dense.product(linear.dense.plain(x), None)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def poison(*shape: int) -> None:
    """Leave NaN in the memory that the next allocation of this size will get."""
    for _ in range(4):
        torch.full(shape, torch.nan, dtype=torch.float16, device="cuda")


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert error < TOLERANCE[got.dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("paired", [False, True])
def test_every_batch(bits, dtype, paired, random):
    matrix = random_matrix(768, 528, bits=bits, random=random)
    linear = CudaLinear(matrix, dtype=dtype, paired=paired)
    for tokens in (*range(1, 65), 100, 128, 129, 300, 4096):
        x = inputs_for(matrix, tokens, dtype)
        want = product(x, matrix)
        poison(tokens, linear.outputs)
        assert_close(linear(x), silu_mul(want) if paired else want)


@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
@pytest.mark.parametrize(("bits", "inputs"), [(4, 1152), (8, 1152), (4, 1088), (4, 64)])
def test_every_plan(plan, bits, inputs, random):
    """Also those that the tables keep for other batches, matrices and GPUs."""
    if isinstance(plan, HopperPlan) and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    matrix = random_matrix(inputs, 600, bits=bits, group_size=64, random=random)
    for paired in (False, True):
        packed = pack(matrix, paired=paired)
        linear = CudaLinear(packed, plan=fitted(plan, layout_of(packed, torch.float16)))
        for tokens in (1, 30, 200):
            x = inputs_for(matrix, tokens, torch.float16)
            want = product(x, matrix)
            poison(tokens, linear.outputs)
            assert_close(linear(x), silu_mul(want) if paired else want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 192, 256, -1])
@pytest.mark.parametrize("inputs", [640, 1000])
def test_every_group_size(inputs, group_size, symmetric, bits, dtype, random):
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    matrix = random_matrix(inputs, 197, **options, random=random)
    linear = CudaLinear(matrix, dtype=dtype)
    for tokens in (1, 5, 16, 33, 70, 600, 1100):
        x = inputs_for(matrix, tokens, dtype)
        assert_close(linear(x), product(x, matrix))
    assert_close(by_cublas(linear, x), product(x, matrix))


@pytest.mark.parametrize("inputs", [8, 64, 72, 576, 1528, 4104, 12288])
@pytest.mark.parametrize("outputs", [1, 7, 16, 17, 250, 2048])
def test_odd_shapes(inputs, outputs, random):
    matrix = random_matrix(inputs, outputs, group_size=32, symmetric=False, random=random)
    linear = CudaLinear(matrix)
    for tokens in (1, 3, 17, 64, 257, 1025):
        x = inputs_for(matrix, tokens, torch.float16)
        poison(tokens, outputs)
        assert_close(linear(x), product(x, matrix))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_scale_dtype(dtype, scale_dtype, random):
    matrix = random_matrix(256, 64, group_size=64, scale_dtype=scale_dtype, random=random)
    linear = CudaLinear(matrix, dtype=dtype)
    for tokens in (2, 20, 512, 1100):
        x = inputs_for(matrix, tokens, dtype)
        assert_close(linear(x), product(x, matrix))


@pytest.mark.parametrize("scale", [1e-5, 10.0])
@pytest.mark.parametrize("tokens", [1, 16, 64, 600, 1100])
def test_extreme_values(tokens, scale, random):
    matrix = random_matrix(2048, 256, scale=scale, random=random)
    x = inputs_for(matrix, tokens, torch.float16)
    x[:, [5, 700]] = 1e4
    want = product(x, matrix)
    fits = want.abs() < 65000
    got = CudaLinear(matrix)(x)
    assert got[fits].isfinite().all()
    # Relative to the whole product: where two outlier channels cancel, weights rounded to fp16
    # (the dense and the Hopper kernel) cannot be more exact than their own size allows.
    error = (got.double() - want)[fits].norm() / want.norm()
    assert error < TOLERANCE[torch.float16]


def test_not_a_number_stays_in_its_row(random):
    matrix = random_matrix(512, 64, random=random)
    linear = CudaLinear(matrix)
    for tokens in (8, 64, 600, 1100):
        x = inputs_for(matrix, tokens, torch.float16)
        x[3, 100] = torch.nan
        bad = linear(x).isnan()
        assert bad[3].all()
        assert bad.sum() == bad[3].numel()


@pytest.mark.parametrize("tokens", [1, 9, 40, 600, 1100])
@pytest.mark.parametrize("paired", [False, True])
def test_bias_and_residual(tokens, paired, random):
    matrix = random_matrix(256, 200, random=random)
    bias = torch.randn(200, device="cuda").half()
    outputs = 100 if paired else 200
    residual = torch.randn(tokens, outputs, device="cuda").half()
    linear = CudaLinear(matrix, bias, paired=paired)
    x = inputs_for(matrix, tokens, torch.float16)
    want = product(x, matrix) + bias.double()
    want = silu_mul(want) if paired else want
    assert_close(linear(x), want)
    want = want + residual.double()
    assert_close(linear(x, residual), want)


@pytest.mark.parametrize("paired", [False, True])
def test_dense_product_in_slabs(paired, random, monkeypatch):
    monkeypatch.setattr(cuda_dense, "SLAB_BYTES", 3 * 16 * 256 * 2)  # three tiles of this matrix
    # Scales that fp16 may not hold go by cuBLAS on every GPU.
    matrix = random_matrix(256, 200, scale_dtype=torch.float32, random=random)
    bias = torch.randn(200, device="cuda").half()
    linear = CudaLinear(matrix, bias, paired=paired)
    x = inputs_for(matrix, 1500, torch.float16)
    residual = torch.randn(1500, linear.outputs, device="cuda").half()
    want = product(x, matrix) + bias.double()
    want = (silu_mul(want) if paired else want) + residual.double()
    assert_close(linear(x, residual), want)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "tokens"),
    [
        *((24576, 100, 1100), (24576, 600, 2500), (2048, 600, 8000), (8192, 600, 8000)),
        *((24576, 100, 20), (8192, 1000, 40), (256, 1000, 60), (24576, 8192, 250)),
    ],
)
def test_tiles_shared_by_blocks(inputs, outputs, tokens, paired, random):
    """A wave that would be partly filled: its tiles have up to eight blocks, which add up.

    On an H100 8,000 tokens leave 36 of 168 tiles to share; the others have blocks of their own.
    The last matrix has 86 tiles, in three parts each: two waves.
    """
    matrix = random_matrix(inputs, outputs, random=random)
    linear = CudaLinear(matrix, paired=paired)
    x = inputs_for(matrix, tokens, torch.float16)
    want = product(x, matrix)
    poison(tokens, linear.outputs)
    got = linear(x)
    assert_close(got, silu_mul(want) if paired else want)
    assert all(torch.equal(got, linear(x)) for _ in range(5))


def test_sums_of_shared_tiles_are_fp32_whatever_torch_defaults_to(random):
    matrix = random_matrix(24576, 600, random=random)
    x = inputs_for(matrix, 1100, torch.float16)
    want = CudaLinear(matrix)(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(CudaLinear(matrix)(x), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_permuted_inputs_with_padding(random):
    matrix = random_matrix(640, 96, symmetric=False, random=random)
    order = torch.randperm(640, device="cuda", generator=random)
    perm = torch.where(order < 600, order, 600)  # 40 padding rows
    matrix = dataclasses.replace(matrix, perm=perm, in_features=600)
    linear = CudaLinear(matrix)
    for tokens in (1, 8, 200, 1100):
        x = inputs_for(matrix, tokens, torch.float16)
        assert_close(linear(x), product(x, matrix))
    assert_close(by_cublas(linear, x), product(x, matrix))


def test_strided_and_misaligned_inputs(random):
    matrix = random_matrix(256, 64, random=random)
    linear = CudaLinear(matrix)
    wide = torch.randn(40, 521, device="cuda").half()
    for x in (wide[:, 1:257], wide[:, :256], wide[:, :512:2], wide[::2, 8:264]):
        assert_close(linear(x), product(x, matrix))


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 64, 600, 1100])
def test_graph_of_a_chain(tokens, dependent, random):
    """A chain of products: each reads what the one before it has only just written."""
    if dependent and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    matrices = [random_matrix(1024, 1024, scale=0.0018, random=random) for _ in range(6)]
    linears = [CudaLinear(m, dependent=dependent) for m in matrices]
    x = inputs_for(matrices[0], tokens, torch.float16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            for linear in linears:
                x = linear(x)
        return x

    def slow_chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            for linear in linears:
                x = linear(x)
                torch.cuda.synchronize()
        return x

    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(y, slow_chain(x))
        assert y.isfinite().all()


def test_dequantize(random):
    matrix = random_matrix(320, 72, group_size=32, symmetric=False, random=random)
    plain = CudaLinear(matrix).dense.dequantize()
    want = ref.dequantize(matrix).t()
    assert torch.equal(plain[:72], want.half())
    paired = CudaLinear(matrix, paired=True).dense.dequantize()
    assert torch.equal(paired[:36], want[:36].half())
    assert torch.equal(paired[40:76], want[36:].half())


def test_refusals(random):
    matrix = random_matrix(256, 64, random=random)
    linear = CudaLinear(matrix)
    for bad in (torch.zeros(2, 255), torch.zeros(2, 256), torch.zeros(256, device="cuda").half()):
        with pytest.raises(ConfigError, match="convert the input"):
            linear(bad)
    x = torch.zeros(2, 256, device="cuda").half()
    with pytest.raises(ConfigError, match="residual"):
        linear(x, torch.zeros(2, 63, device="cuda").half())
    with pytest.raises(ConfigError, match="fp16 and bf16"):
        CudaLinear(matrix, dtype=torch.float32)
    with pytest.raises(ConfigError, match="group size 48"):
        CudaLinear(random_matrix(96, 64, group_size=48, random=random))
    assert linear(x[:0]).shape == (0, 64)
