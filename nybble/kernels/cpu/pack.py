"""Bring a quantised matrix into the order in which matmul.c reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nybble.kernels.cpu.library import KINDS, Matrix
from nybble.kernels.matrix import QuantMatrix

TILE = 16  # outputs side by side
BLOCK = 32  # inputs that share one activation scale


@dataclass(frozen=True)
class PackedMatrix:
    """The tensors behind a `Matrix` structure; it points into them, so they stay together."""

    structure: Matrix
    tensors: tuple[torch.Tensor | None, ...]


def pack(matrix: QuantMatrix, bias: torch.Tensor | None) -> PackedMatrix:
    """Outputs padded to 16, inputs to 32; group_size a multiple of 32, or one group."""
    rows, outputs = matrix.rows, matrix.out_features
    blocks = -(-rows // BLOCK)
    groups = matrix.scales.shape[0]
    words = _tiles(matrix.words, blocks * BLOCK * matrix.bits // 32)
    scales = _tiles(_narrow(matrix.scales), groups)
    zeros = None if matrix.zeros is None else _tiles(matrix.zeros, groups)
    perm = None if matrix.perm is None else matrix.perm.to(torch.int32).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    tensors = (words, scales, zeros, bias, perm)
    structure = Matrix(
        *(None if t is None else t.data_ptr() for t in tensors),
        matrix.in_features,
        outputs,
        rows,
        groups,
        blocks if groups == 1 else matrix.group_size // BLOCK,
        matrix.bits,
        KINDS[scales.dtype],
    )
    return PackedMatrix(structure, tensors)


def _tiles(table: torch.Tensor, height: int) -> torch.Tensor:
    """(rows, N) -> (N / 16, height, 16), zeros where it had nothing."""
    columns = -(-table.shape[1] // TILE)
    if table.shape != (height, columns * TILE):  # padding copies even where nothing is added
        table = F.pad(table, (0, columns * TILE - table.shape[1], 0, height - table.shape[0]))
    return table.reshape(height, columns, TILE).transpose(0, 1).contiguous()


def _narrow(scales: torch.Tensor) -> torch.Tensor:
    """fp16 where that holds every scale to its own precision, else fp32."""
    half = scales.to(torch.float16)
    if scales.dtype == torch.float16 or torch.equal(half.float(), scales.float()):
        return half
    return scales.to(torch.float32)
