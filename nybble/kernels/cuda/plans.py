"""Which kernel, in which shape, serves which batch: candidates and costs, measured on an H100."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import ClassVar, NamedTuple

import torch

from nybble.kernels.cuda.packing import PIECE, SHORT_GROUPS, PackedMatrix

COLUMN = 8  # tokens of one mma
_SCALE_CODES = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}


class Layout(NamedTuple):
    """What a plan needs to know of a packed matrix."""

    bits: int
    rows: int
    tiles: int
    groups: int
    group_size: int
    exact_scales: bool  # the activations' type holds the scales without overflow
    paired: bool = False  # gate and up, of which the product makes silu(gate) * up


def layout_of(matrix: PackedMatrix, dtype: torch.dtype) -> Layout:
    return Layout(
        bits=matrix.bits,
        rows=matrix.rows,
        tiles=matrix.tiles,
        groups=matrix.groups,
        group_size=matrix.group_size,
        exact_scales=dtype == torch.bfloat16 or matrix.scales.dtype == torch.float16,
        paired=matrix.paired,
    )


class Gpu(NamedTuple):
    multiprocessors: int
    hopper: bool


class Shares(NamedTuple):
    """Tiles of a product: `whole` have a block each, `shared` have `parts` each."""

    whole: int
    shared: int = 0
    parts: int = 1

    @property
    def blocks(self) -> int:
        return self.whole + self.shared * self.parts


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
    min_blocks: int = 4
    pieces: int = 2

    name: ClassVar[str] = "gemm"
    overhead: ClassVar[int] = 1  # start and end of a block, in steps of 128 inputs
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
            "MIN_BLOCKS": self.min_blocks,
            "PIECES": self.pieces,
        }


@dataclass(frozen=True)
class HopperPlan:
    """Compile-time shape of gemm_hopper.cu, for compute capability 9.0 only.

    band: token blocks that take all row blocks before the next ones begin.
    """

    tokens: int
    warpgroups: int = 2
    split: int = 1
    depth: int = 2
    buffers: int = 4
    min_blocks: int = 1
    pieces: int = 2
    band: int = 12

    name: ClassVar[str] = "gemm_hopper"
    overhead: ClassVar[int] = 5

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """The buffers of tokens, later the sums of the block, rows padded by four floats."""
        inputs = self.buffers * self.pieces * self.tokens * PIECE * 2
        return max(inputs, self.tokens * (64 * self.warpgroups + 4) * 4)

    def shares(self, tokens: int, tiles: int, rows: int, multiprocessors: int) -> Shares:
        """Tiles that would not fill a wave of blocks are shared, where no cluster splits them."""
        blocks = -(-tokens // self.tokens) * -(-tiles // (4 * self.warpgroups))
        rest = blocks % multiprocessors
        if self.split > 1 or self.min_blocks > 1 or rest == 0:
            return Shares(blocks)
        # steps / parts + _ADDING * parts is least at the root.
        parts = min(multiprocessors // rest, isqrt(rows // (128 * _ADDING)))
        return Shares(blocks - rest, rest, parts) if parts > 1 else Shares(blocks)

    def scratch_floats(self, shares: Shares) -> int:
        return shares.shared * shares.parts * self.tokens * 64 * self.warpgroups

    def defines(self) -> dict[str, int]:
        return {
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "SPLIT": self.split,
            "DEPTH": self.depth,
            "BUFFERS": self.buffers,
            "MIN_BLOCKS": self.min_blocks,
            "PIECES": self.pieces,
            "BAND": self.band,
        }


Plan = MmaPlan | HopperPlan

# What one more part of a shared tile costs, in steps of 128 inputs: its sums, 147 KB for tiles of
# 192 x 192, written to the L2 and read by one block.
_ADDING = 2

# Up to so many tokens: candidates, each with the time that a block takes for 128 inputs (in units
# that compare within a row). docs/decisions/003 has the measurements.
_Table = tuple[tuple[int, tuple[tuple[float, Plan], ...]], ...]

_MOST_TOKENS = 1 << 31
_ONE_COLUMN = MmaPlan(columns=1)
_TWO_COLUMNS = (
    (1.0, MmaPlan(columns=2, tiles=2, min_blocks=2)),
    (1.0, MmaPlan(columns=2, tiles=2, slices=4)),
)
_MMA: _Table = (
    (8, ((1.0, _ONE_COLUMN),)),
    (16, _TWO_COLUMNS),
    (32, ((1.0, MmaPlan(columns=4, tiles=2, slices=4, min_blocks=2)),)),
    (128, ((1.0, MmaPlan(columns=8, tiles=2, slices=4, depth=1, min_blocks=2)),)),
)
_MEDIUM = tuple(
    (1.18, HopperPlan(128, warpgroups=3, split=split, depth=3 if split == 1 else 2))
    for split in (1, 2, 4)
)
_LARGE = tuple(
    (1.13, HopperPlan(128, warpgroups=3, split=split, depth=1, buffers=3, pieces=4))
    for split in (1, 2, 4)
)
_WIDEST = (1.7, HopperPlan(192, warpgroups=3, band=6))
_WIDE_64 = (1.08, HopperPlan(64, split=2, depth=4, buffers=5, min_blocks=2))
_HOPPER: _Table = (
    *_MMA[:2],
    (32, ((1.0, HopperPlan(32, warpgroups=1, split=4, depth=3, min_blocks=4)),)),
    (
        64,
        (
            (0.77, HopperPlan(64, warpgroups=1, split=2, depth=4, buffers=5, min_blocks=2)),
            _WIDE_64,
        ),
    ),
    (128, (_WIDE_64, *_MEDIUM)),
    (1024, (*_LARGE, _WIDEST)),
    # Power counts here, and the widest tiles unpack weights least often: others must be far better.
    (4096, ((1.4, _LARGE[0][1]), _WIDEST)),
    (_MOST_TOKENS, (_WIDEST,)),
)
ALL_PLANS = tuple(
    dict.fromkeys(plan for table in (_MMA, _HOPPER) for _, row in table for _, plan in row)
)


@lru_cache(maxsize=4096)
def plan_for(tokens: int, layout: Layout, gpu: Gpu) -> Plan | None:
    """The kernel's shape for this batch, or None: cuBLAS on dequantised weights."""
    table = _HOPPER if gpu.hopper and layout.exact_scales else _MMA
    candidates = next((row for most, row in table if tokens <= most), None)
    if candidates is None:
        return None
    _, plan = min(candidates, key=lambda item: item[0] * _block_steps(item[1], tokens, layout, gpu))
    return fitted(plan, layout)


def matrix_defines(matrix: PackedMatrix, dtype: torch.dtype, pieces: int) -> dict[str, int]:
    """The macros of fragment.cuh, for chunks of so many pieces."""
    return {
        "BITS": matrix.bits,
        "BF16": int(dtype == torch.bfloat16),
        "SCALE": _SCALE_CODES[matrix.scales.dtype],
        "ASYM": int(matrix.zeros is not None),
        "PAIRED": int(matrix.paired),
        "GROUP": group_define(layout_of(matrix, dtype), pieces),
    }


def group_define(layout: Layout, pieces: int) -> int:
    """GROUP of the kernels: the group size if a chunk of `pieces` holds whole groups, else 0."""
    short = layout.group_size in SHORT_GROUPS and layout.groups > 1
    return layout.group_size if short and layout.group_size <= pieces * PIECE else 0


def inverse(divisor: int) -> int:
    """What divide() of fragment.cuh takes for a divisor."""
    return 2**31 // divisor + 1


def fitted(plan: Plan, layout: Layout) -> Plan:
    """The plan for this matrix: chunks must not straddle groups, nor end beyond the matrix.

    Codes of 8 bits fill twice the registers: half as many chunks of them are kept on their way.
    """
    if isinstance(plan, MmaPlan):
        whole = _in_whole_chunks(plan.pieces, layout) and layout.bits == 4
        return plan if whole else replace(plan, pieces=1)
    depth = plan.depth if layout.bits == 4 else -(-plan.depth // 2)
    smaller = (pieces for pieces in (4, 2) if pieces <= plan.pieces)
    pieces = next((pieces for pieces in smaller if _in_whole_chunks(pieces, layout)), 1)
    more = plan.pieces // pieces  # chunks, so that as many inputs are on their way
    return replace(plan, pieces=pieces, depth=depth * more, buffers=plan.buffers * more)


def _in_whole_chunks(pieces: int, layout: Layout) -> bool:
    chunk, size = pieces * PIECE, layout.group_size
    aligned = layout.groups == 1 or size % chunk == 0 or chunk % size == 0
    return layout.rows % chunk == 0 and aligned


def _block_steps(plan: Plan, tokens: int, layout: Layout, gpu: Gpu) -> float:
    """How long the longest multiprocessor works, in steps of 128 inputs of one block."""
    slots, steps = gpu.multiprocessors * plan.min_blocks, layout.rows / 128
    if isinstance(plan, MmaPlan):
        across, down = plan.grid(tokens, layout.tiles)
        return -(-across * down // slots) * (steps / plan.slices + plan.overhead)
    shares = plan.shares(tokens, layout.tiles, layout.rows, gpu.multiprocessors)
    taken = -(-shares.whole * plan.split // slots) * (steps / plan.split + plan.overhead)
    if shares.shared:
        taken += steps / shares.parts + _ADDING * shares.parts + plan.overhead
    return taken
