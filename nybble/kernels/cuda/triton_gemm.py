"""The portable matrix kernel: for GPUs that the CUDA kernels do not serve, and for their tests.

It reads a QuantMatrix as it is, without repacking, and runs wherever Triton does: on the CPU in
Triton's interpreter (TRITON_INTERPRET=1), where the CI tests it on small shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.errors import ConfigError
from nybble.kernels.matrix import QuantMatrix
from nybble.kernels.ref import gather_inputs

_BLOCKS_K = (128, 64, 32, 16)
_WARPS = 4
# Before 8.0 Triton multiplies without tensor cores: more than this does not fit the registers.
_OLD_BLOCKS_K, _OLD_WARPS = (32, 16), 8
_BLOCK_N = 64
_WANTED_BLOCKS = 512  # a small batch splits K until the grid has about so many


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gemm(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    x,
    words,
    scales,
    zeros,
    sums,
    tokens,
    outputs,
    inputs,
    group_size,
    steps,
    bits: tl.constexpr,
    asym: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """One slice of K of one block of y, in fp32: sums is (slices, tokens, outputs)."""
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    part = tl.program_id(2)
    pack: tl.constexpr = 32 // bits
    middle: tl.constexpr = 1 << (bits - 1)
    total = tl.zeros((block_m, block_n), dtype=tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        k = step * block_k + tl.arange(0, block_k)
        inside = (k < inputs)[:, None] & (n < outputs)[None, :]
        word = tl.load(words + (k // pack)[:, None] * outputs + n[None, :], mask=inside, other=0)
        codes = (word >> ((k % pack) * bits)[:, None]) & ((1 << bits) - 1)
        group = tl.minimum(step * block_k, inputs - 1) // group_size * outputs + n
        if asym:
            codes -= tl.load(zeros + group, mask=n < outputs, other=0).to(tl.int32)[None, :]
        else:
            codes -= middle
        scale = tl.load(scales + group, mask=n < outputs, other=0).to(tl.float32)
        known = (m < tokens)[:, None] & (k < inputs)[None, :]
        values = tl.load(x + m[:, None] * inputs + k[None, :], mask=known, other=0)
        # Codes less zero points are whole numbers up to 255: exact in every activation type.
        product = tl.dot(values, codes.to(values.dtype), input_precision="ieee")
        total += product * scale[None, :]
    at = (part * tokens + m)[:, None] * outputs + n[None, :]
    tl.store(sums + at, total, mask=(m < tokens)[:, None] & (n < outputs)[None, :])


def refusal(matrix: QuantMatrix) -> str | None:
    """Why the Triton kernel cannot take this matrix, or None if it can."""
    if matrix.bits not in (4, 8):
        return f"{matrix.bits} bits; the Triton kernel takes 4 and 8"
    if matrix.scales.shape[0] > 1 and matrix.group_size % _BLOCKS_K[-1]:
        return f"group size {matrix.group_size}; the Triton kernel takes multiples of 16"
    return None


def _is_old(matrix: QuantMatrix) -> bool:
    cuda = matrix.device.type == "cuda"
    return cuda and torch.cuda.get_device_capability(matrix.device) < (8, 0)


class TritonLinear:
    """y = x W + bias; x (tokens, K) in fp16, bf16 or fp32, y (tokens, N) in the same dtype."""

    def __init__(self, matrix: QuantMatrix, bias: torch.Tensor | None = None) -> None:
        reason = refusal(matrix)
        if reason is not None:
            raise ConfigError(f"This matrix has {reason}: choose another kernel for it.")
        one_group = matrix.scales.shape[0] == 1
        self._matrix = matrix
        self._words = matrix.words.contiguous()
        self._scales = matrix.scales.contiguous()
        self._zeros = None if matrix.zeros is None else matrix.zeros.contiguous()
        self._bias = bias
        self._group_size = matrix.rows if one_group else matrix.group_size
        sizes, self._warps = (_OLD_BLOCKS_K, _OLD_WARPS) if _is_old(matrix) else (_BLOCKS_K, _WARPS)
        self._block_k = next(
            size for size in sizes if matrix.group_size % size == 0 or (one_group and size <= 64)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self._matrix
        if x.dim() != 2 or x.shape[1] != matrix.in_features or x.device != matrix.device:
            raise ConfigError(
                f"This linear takes (tokens, {matrix.in_features}) on {matrix.device}, got "
                f"{tuple(x.shape)} on {x.device}: convert the input."
            )
        tokens, outputs = x.shape[0], matrix.out_features
        if tokens == 0:
            return x.new_empty(0, outputs)
        x = gather_inputs(x, matrix).contiguous()
        block_m = min(64, max(16, triton.next_power_of_2(tokens)))
        across, down = triton.cdiv(outputs, _BLOCK_N), triton.cdiv(tokens, block_m)
        all_steps = triton.cdiv(matrix.rows, self._block_k)
        slices = max(1, min(all_steps, _WANTED_BLOCKS // (across * down)))
        steps = triton.cdiv(all_steps, slices)
        sums = torch.empty(slices, tokens, outputs, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # triton takes the current one
            _gemm[(across, down, slices)](
                *(x, self._words, self._scales, self._zeros, sums),
                *(tokens, outputs, matrix.rows, self._group_size, steps),
                bits=matrix.bits,
                asym=matrix.zeros is not None,
                block_m=block_m,
                block_n=_BLOCK_N,
                block_k=self._block_k,
                num_warps=self._warps,
            )
        y = sums.sum(0)
        return (y if self._bias is None else y + self._bias).to(x.dtype)
