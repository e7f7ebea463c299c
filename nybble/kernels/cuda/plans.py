"""Which shape of the gemm kernel serves which batch: a table, measured on an H100."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nybble.kernels.cuda.packing import PIECE, SHORT_GROUPS, PackedMatrix

COLUMN = 8  # tokens of one mma


@dataclass(frozen=True)
class Plan:
    """Compile-time shape of gemm.cu; its opening comment says what the names mean.

    min_blocks: blocks that must fit on a multiprocessor, which caps the registers.
    """

    columns: int
    tiles: int = 1
    slices: int = 8
    bands: int = 1
    depth: int = 2
    stage_inputs: bool = False
    min_blocks: int = 3
    pieces: int = 2

    @property
    def threads(self) -> int:
        return 32 * self.slices * self.bands

    def grid(self, tokens: int, tiles: int) -> tuple[int, int]:
        """Token blocks run fastest: those that read the same weights run at the same time."""
        return -(-tokens // (COLUMN * self.columns)), -(-tiles // (self.tiles * self.bands))

    def defines(self, matrix: PackedMatrix) -> dict[str, int]:
        short = matrix.group_size in SHORT_GROUPS and matrix.groups > 1
        return {
            "GROUP": matrix.group_size if short else 0,
            "COLUMNS": self.columns,
            "TILES": self.tiles,
            "SLICES": self.slices,
            "BANDS": self.bands,
            "DEPTH": self.depth,
            "STAGE_INPUTS": int(self.stage_inputs),
            "MIN_BLOCKS": self.min_blocks,
            "PIECES": self.pieces,
        }


# The first row that takes the batch is used; beyond the last, dequantise and call cuBLAS.
_TABLE = (
    (8, Plan(columns=1)),
    (16, Plan(columns=2)),
    (32, Plan(columns=4, tiles=2, min_blocks=1)),
    (128, Plan(columns=8, tiles=2, depth=1, min_blocks=1)),
)


def plan_for(tokens: int, matrix: PackedMatrix, multiprocessors: int) -> Plan | None:
    """The kernel's shape for this batch, or None where cuBLAS on dequantised weights is faster."""
    return next((_fitted(plan, matrix) for most, plan in _TABLE if tokens <= most), None)


def _fitted(plan: Plan, matrix: PackedMatrix) -> Plan:
    """Chunks must not straddle groups, nor end beyond the matrix."""
    chunk = plan.pieces * PIECE
    whole = matrix.rows % chunk == 0 and (
        matrix.groups == 1 or matrix.group_size % chunk == 0 or chunk % matrix.group_size == 0
    )
    return plan if whole else replace(plan, pieces=1)
