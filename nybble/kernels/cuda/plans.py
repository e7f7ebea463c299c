"""Which kernel, in which shape, serves which batch: a table, measured on an H100."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from nybble.kernels.cuda.packing import PIECE, SHORT_GROUPS, PackedMatrix

COLUMN = 8  # tokens of one mma


@dataclass(frozen=True)
class MmaPlan:
    """Compile-time shape of gemm.cu; its opening comment says what the names mean.

    min_blocks: blocks that must fit on a multiprocessor, which caps the registers.
    """

    columns: int
    tiles: int = 1
    slices: int = 8
    bands: int = 1
    depth: int = 2
    stage_inputs: bool = False
    min_blocks: int = 4
    pieces: int = 2

    name: ClassVar[str] = "gemm"
    shared_bytes: ClassVar[int] = 0

    @property
    def threads(self) -> int:
        return 32 * self.slices * self.bands

    def grid(self, tokens: int, tiles: int) -> tuple[int, int]:
        """Token blocks run fastest: those that read the same weights run at the same time."""
        return -(-tokens // (COLUMN * self.columns)), -(-tiles // (self.tiles * self.bands))

    def defines(self) -> dict[str, int]:
        return {
            "COLUMNS": self.columns,
            "TILES": self.tiles,
            "SLICES": self.slices,
            "BANDS": self.bands,
            "DEPTH": self.depth,
            "STAGE_INPUTS": int(self.stage_inputs),
            "MIN_BLOCKS": self.min_blocks,
            "PIECES": self.pieces,
        }


@dataclass(frozen=True)
class HopperPlan:
    """Compile-time shape of gemm_hopper.cu, for compute capability 9.0 only."""

    tokens: int
    warpgroups: int = 2
    split: int = 1
    depth: int = 4
    buffers: int = 5
    min_blocks: int = 1

    name: ClassVar[str] = "gemm_hopper"
    pieces: ClassVar[int] = 1

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """The buffers of tokens, later the sums of the block, rows padded by four floats."""
        inputs = self.buffers * self.tokens * PIECE * 2
        return max(inputs, self.tokens * (64 * self.warpgroups + 4) * 4)

    def grid(self, tokens: int, tiles: int) -> tuple[int, int]:
        return -(-tokens // self.tokens) * self.split, -(-tiles // (4 * self.warpgroups))

    def defines(self) -> dict[str, int]:
        return {
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "SPLIT": self.split,
            "DEPTH": self.depth,
            "BUFFERS": self.buffers,
            "MIN_BLOCKS": self.min_blocks,
        }


Plan = MmaPlan | HopperPlan

# The first row that takes the batch is used; beyond the last, dequantise and call cuBLAS.
_MMA_TABLE: tuple[tuple[int, MmaPlan], ...] = (
    (8, MmaPlan(columns=1)),
    (16, MmaPlan(columns=2, tiles=2, min_blocks=2)),
    (32, MmaPlan(columns=4, tiles=2, slices=4, min_blocks=2)),
    (128, MmaPlan(columns=8, tiles=2, slices=4, depth=1, min_blocks=2)),
)


def plan_for(tokens: int, matrix: PackedMatrix, multiprocessors: int) -> Plan | None:
    """The kernel's shape for this batch, or None where cuBLAS on dequantised weights is faster."""
    return next((_fitted(plan, matrix) for most, plan in _MMA_TABLE if tokens <= most), None)


def group_define(matrix: PackedMatrix, pieces: int) -> int:
    """GROUP of the kernels: the group size if a chunk of `pieces` holds whole groups, else 0."""
    short = matrix.group_size in SHORT_GROUPS and matrix.groups > 1
    return matrix.group_size if short and matrix.group_size <= pieces * PIECE else 0


def inverse(divisor: int) -> int:
    """What divide() of fragment.cuh takes for a divisor."""
    return 2**31 // divisor + 1


def _fitted(plan: MmaPlan, matrix: PackedMatrix) -> MmaPlan:
    """Chunks must not straddle groups, nor end beyond the matrix."""
    chunk = plan.pieces * PIECE
    whole = matrix.rows % chunk == 0 and (
        matrix.groups == 1 or matrix.group_size % chunk == 0 or chunk % matrix.group_size == 0
    )
    return plan if whole else replace(plan, pieces=1)
