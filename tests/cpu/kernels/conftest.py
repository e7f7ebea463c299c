"""The C kernels as compiled for this machine, and with their instruction sets taken away."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from nybble.kernels.cpu.backend import CpuBackend
from nybble.kernels.matrix import QuantMatrix
from nybble.kernels.ref import RefBackend

# Each level must be one that this CPU has; -O1 keeps the compilation short.
VARIANTS = {
    "native": (),
    "portable": ("-DNYBBLE_PORTABLE", "-O1"),
    "avx2": ("-march=x86-64-v3", "-O1"),
}


def _has_avx2() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpuinfo.exists() and "avx2" in cpuinfo.read_text()


@pytest.fixture(scope="session", params=list(VARIANTS))
def cpu(request) -> CpuBackend:
    if request.param == "avx2" and not _has_avx2():
        pytest.skip("this CPU has no AVX2")
    return CpuBackend.load(VARIANTS[request.param])


@pytest.fixture(scope="session")
def native() -> CpuBackend:
    return CpuBackend.load()


@pytest.fixture(scope="session")
def ref() -> RefBackend:
    return RefBackend()


def random_matrix(
    inputs: int,
    outputs: int,
    bits: int = 4,
    group_size: int = 32,
    asymmetric: bool = False,
    padding: int = 0,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantMatrix:
    """Random words; `padding` rows without an input are spread among the act-order rows."""
    rows = inputs + padding
    groups = -(-rows // group_size)
    words = torch.randint(-(2**31), 2**31, (-(-rows * bits // 32), outputs), dtype=torch.int64)
    scales = (torch.rand(groups, outputs) * 0.02 + 0.001).to(scale_dtype)
    zeros = torch.randint(0, 2**bits, (groups, outputs), dtype=torch.uint8) if asymmetric else None
    perm = None
    if act_order or padding:
        perm = torch.randperm(rows).clamp(max=inputs)
    return QuantMatrix(bits, group_size, inputs, words.to(torch.int32), scales, zeros, perm)


@pytest.fixture(scope="session")
def make_matrix():
    return random_matrix
