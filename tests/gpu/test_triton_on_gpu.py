"""The Triton kernel compiled for a GPU, in every activation type."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from nybble.kernels import ref
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.cuda.triton_gemm import TritonLinear

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ,
    reason="needs a GPU, and TRITON_INTERPRET unset",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "inputs"), [(16, 1040), (128, 1000), (-1, 777)])
def test_matches_the_plain_product(group_size, inputs, symmetric, bits, dtype):
    random = torch.Generator("cuda").manual_seed(inputs)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    matrix = random_matrix(inputs, 500, **options, random=random)
    linear = TritonLinear(matrix)
    for tokens in (1, 16, 70, 300):
        x = torch.randn(tokens, inputs, device="cuda", generator=random).to(dtype)
        want = x.double() @ ref.dequantize(matrix).double()
        error = (linear(x).double() - want).norm() / want.norm()
        assert error < TOLERANCE[dtype]
