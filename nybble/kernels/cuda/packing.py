"""The order in which quantised weights lie in GPU memory: that of mma.m16n8k16 registers.

A tile is 16 outputs, a piece 64 inputs of it. Lane (g, t) of a warp, g < 8 and t < 4, owns the
outputs g and g + 8 and the inputs 8 t .. 8 t + 7 of either half of a piece, four (a quad) per k16
step. A quad of both outputs is one 32-bit word at 4 bits, two at 8; four words in a row are one
lane's 16-byte load. Both halves of a register hold neighbouring inputs, so a word's nibbles stand
in the order (output g or g + 8, input): (g,0) (g+8,0) (g,2) (g+8,2) (g,1) (g+8,1) (g,3) (g+8,3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from nybble.errors import ConfigError
from nybble.kernels.matrix import QuantMatrix

TILE = 16
PIECE = 64
SHORT_GROUPS = (32, 64, 128)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedMatrix:
    """A QuantMatrix in the kernels' own order, padded to whole tiles and pieces.

    words:  int32 (tiles, pieces, bits / 4, 32 lanes, 4).
    scales: (tiles, groups, 8, 2), the pair of outputs g and g + 8; padding has scale 0.
    zeros:  uint8, shaped like scales, or None where symmetric.
    gather: int32 (pieces * 64,) or None: which input of x each row takes, -1 for none.
    paired: the outputs g of all tiles are the first half of the matrix (gate), g + 8 the second
            half (up); the kernels then give silu(gate) * up.
    """

    bits: int
    group_size: int
    in_features: int
    out_features: int
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    gather: torch.Tensor | None
    paired: bool

    @property
    def tiles(self) -> int:
        return self.words.shape[0]

    @property
    def pieces(self) -> int:
        return self.words.shape[1]

    @property
    def rows(self) -> int:
        """Inputs as stored, padding included."""
        return self.pieces * PIECE

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    @property
    def outputs(self) -> int:
        """Of the product: gate and up are one where paired."""
        return self.out_features // 2 if self.paired else self.out_features

    @property
    def nbytes(self) -> int:
        parts = (self.words, self.scales, self.zeros, self.gather)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def refusal(matrix: QuantMatrix) -> str | None:
    """Why the CUDA kernels cannot take this matrix, or None if they can."""
    if matrix.bits not in (4, 8):
        return f"{matrix.bits} bits; the CUDA kernels take 4 and 8"
    if matrix.scales.dtype not in SCALE_DTYPES:
        return f"scales of {matrix.scales.dtype}; the CUDA kernels take fp16, bf16 and fp32"
    size = matrix.group_size
    one_group = matrix.scales.shape[0] == 1
    if not one_group and size not in SHORT_GROUPS and size % PIECE:
        return f"group size {size}; the CUDA kernels take 32, 64 and multiples of 64"
    return None


def pack(matrix: QuantMatrix, *, paired: bool = False) -> PackedMatrix:
    """Reorder a matrix on the device it is on; a few times its packed size is used on the way.

    `paired` is for a matrix (K, 2 * width) of gate and up columns, gate first.
    """
    reason = refusal(matrix)
    if reason is not None:
        raise ConfigError(f"This matrix has {reason}: choose another kernel for it.")
    if paired and matrix.out_features % 2:
        raise ConfigError(
            f"{matrix.out_features} outputs are no pair of gate and up: pack them separately."
        )
    group_size = matrix.group_size if matrix.scales.shape[0] > 1 else 0
    rows = padded_rows(matrix.rows, group_size)
    groups = rows // group_size if group_size in SHORT_GROUPS else matrix.scales.shape[0]
    zeros = matrix.zeros
    return PackedMatrix(
        bits=matrix.bits,
        group_size=group_size or rows,
        in_features=matrix.in_features,
        out_features=matrix.out_features,
        words=_reorder(_tiled(matrix.words, paired), matrix.bits, rows // PIECE),
        scales=_group_pairs(matrix.scales, groups, paired),
        zeros=None if zeros is None else _group_pairs(zeros, groups, paired),
        gather=_gather_index(matrix, rows),
        paired=paired,
    )


def padded_rows(rows: int, group_size: int) -> int:
    """Inputs as stored; group_size is 0 where there is only one group."""
    unit = max(PIECE, group_size if group_size in SHORT_GROUPS else 0)
    return -(-rows // unit) * unit


def _tiled(columns: torch.Tensor, paired: bool) -> torch.Tensor:
    """(rows, N) -> (rows, tiles, 2, 8): output g and g + 8 of each tile, padded with zeros."""
    rows, n = columns.shape
    if paired:
        padded = pad(columns.reshape(rows, 2, n // 2), (0, -(n // 2) % 8))
        return padded.view(rows, 2, -1, 8).transpose(1, 2)
    return pad(columns, (0, -n % TILE)).reshape(rows, -1, 2, 8)


def _group_pairs(values: torch.Tensor, groups: int, paired: bool) -> torch.Tensor:
    """(G, N) -> (tiles, groups, 8, 2)."""
    padded = pad(values, (0, 0, 0, groups - values.shape[0]))
    return _tiled(padded, paired).permute(1, 0, 3, 2).contiguous()


def _reorder(words: torch.Tensor, bits: int, pieces: int) -> torch.Tensor:
    """(words, tiles, 2, 8) in the GPTQ order -> (tiles, pieces, bits / 4, 32, 4)."""
    per_piece = PIECE * bits // 32
    words = pad(words, (0, 0, 0, 0, 0, 0, 0, pieces * per_piece - words.shape[0]))
    # A GPTQ word holds eight inputs of one output at 4 bits, four at 8. Its 16-bit halves hold
    # one quad (4 bits) or half a quad (8 bits): (pieces, halves, tiles, 2, 8).
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=1)
    if bits == 4:
        spread = (halves & 0x0F0F) | ((halves & 0xF0F0) << 12)
        joined = spread[..., 0, :] | (spread[..., 1, :] << 4)
    else:
        spread = (halves & 0x00FF) | ((halves & 0xFF00) << 8)
        joined = spread[..., 0, :] | (spread[..., 1, :] << 8)
    tiles = words.shape[1]
    quads = joined.view(pieces, 2, 4, bits // 2, tiles, 8)  # k runs as (piece, half, t, words)
    # 4 bits, both halves in a vector: (tiles, pieces, g, t, half, words).
    # 8 bits, a vector for each half: (tiles, pieces, half, g, t, words).
    order = (4, 0, 5, 2, 1, 3) if bits == 4 else (4, 0, 1, 5, 2, 3)
    return quads.permute(order).reshape(tiles, pieces, bits // 4, 32, 4)


def _gather_index(matrix: QuantMatrix, rows: int) -> torch.Tensor | None:
    if matrix.perm is None:
        if rows == matrix.rows:
            return None
        index = torch.arange(matrix.rows, device=matrix.device)
    else:
        index = torch.where(matrix.perm == matrix.in_features, -1, matrix.perm)
    return pad(index, (0, rows - matrix.rows), value=-1).to(torch.int32)
