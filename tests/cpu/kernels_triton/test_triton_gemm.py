"""The Triton kernel on the CPU, in Triton's interpreter, against the plain product."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from nybble.errors import ConfigError
from nybble.kernels import ref
from nybble.kernels.cuda import triton_gemm
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.cuda.triton_gemm import TritonLinear

# The interpreter cannot multiply bf16 blocks: tests/gpu has them.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}


def relative_error(matrix, x, bias=None):
    want = ref.gather_inputs(x.double(), matrix) @ ref.dequantize(matrix).double()
    want = want if bias is None else want + bias.double()
    got = TritonLinear(matrix, bias)(x)
    assert got.shape == want.shape
    assert got.dtype == x.dtype
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "inputs"), [(16, 48), (32, 100), (128, 256), (-1, 90)])
def test_matches_the_plain_product(group_size, inputs, symmetric, bits, dtype):
    random = torch.Generator().manual_seed(inputs)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    matrix = random_matrix(inputs, 70, **options, random=random)
    bias = torch.randn(70, generator=random).to(dtype)
    for tokens in (1, 19):
        x = torch.randn(tokens, inputs, generator=random).to(dtype)
        assert relative_error(matrix, x, bias) < TOLERANCE[dtype]


def test_permuted_inputs_with_padding():
    random = torch.Generator().manual_seed(5)
    matrix = random_matrix(96, 33, group_size=32, symmetric=False, random=random)
    order = torch.randperm(96, generator=random)
    matrix = dataclasses.replace(matrix, in_features=90, perm=torch.where(order < 90, order, 90))
    x = torch.randn(3, 90, generator=random)
    assert relative_error(matrix, x) < TOLERANCE[torch.float32]


def test_refusals_say_what_to_do():
    random = torch.Generator().manual_seed(6)
    with pytest.raises(ConfigError, match=r"multiples of 16.*choose another kernel"):
        TritonLinear(random_matrix(80, 16, group_size=40, random=random))
    linear = TritonLinear(random_matrix(64, 16, group_size=32, random=random))
    with pytest.raises(ConfigError, match="convert the input"):
        linear(torch.zeros(2, 65))
    assert linear(torch.zeros(0, 64)).shape == (0, 16)


@pytest.mark.parametrize(("group_size", "inputs"), [(16, 48), (128, 256), (-1, 90)])
def test_gpus_without_tensor_cores_for_triton_take_small_blocks(monkeypatch, group_size, inputs):
    monkeypatch.setattr(triton_gemm, "_is_old", lambda matrix: True)
    random = torch.Generator().manual_seed(inputs)
    matrix = random_matrix(inputs, 70, group_size=group_size, random=random)
    x = torch.randn(20, inputs, generator=random)
    assert TritonLinear(matrix)._block_k <= 32
    assert relative_error(matrix, x) < TOLERANCE[x.dtype]
