"""Which kernel, in which shape, serves which batch: candidates and costs, measured on an H100."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
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
    warpgroups: int = 3
    depth: int = 1
    buffers: int = 4
    min_blocks: int = 1
    pieces: int = 4
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

    def blocks(self, tokens: int, tiles: int) -> int:
        """Of a product whose tiles have a block each."""
        return -(-tokens // self.tokens) * -(-tiles // (4 * self.warpgroups))

    def scratch_floats(self, shares: Shares) -> int:
        return shares.shared * shares.parts * self.tokens * 64 * self.warpgroups

    def defines(self) -> dict[str, int]:
        return {
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "DEPTH": self.depth,
            "BUFFERS": self.buffers,
            "MIN_BLOCKS": self.min_blocks,
            "PIECES": self.pieces,
            "BAND": self.band,
        }


Plan = MmaPlan | HopperPlan

# What one more part of a shared tile costs, in steps of 128 inputs where a multiprocessor has one
# block: its sums, written to the L2 and read by one block.
_ADDING = 3
_MOST_PARTS = 8
_MOST_WAVES = 2  # of parts

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
_WGMMA_96 = HopperPlan(96)
_WGMMA_128 = HopperPlan(128, buffers=3)
_WIDEST = HopperPlan(192, depth=2, pieces=2, band=6)
_HOPPER: _Table = (
    *_MMA[:2],
    (32, ((1.0, HopperPlan(32, warpgroups=2, buffers=3, min_blocks=2, pieces=8)),)),
    (48, ((1.0, HopperPlan(48, buffers=3, pieces=8)),)),
    (64, ((1.0, HopperPlan(64, buffers=3, pieces=8)),)),
    (1024, ((0.84, _WGMMA_96), (1.0, _WGMMA_128), (1.36, _WIDEST))),
    # Power counts here, and the widest tiles unpack weights least often: others must be far better.
    (4096, ((1.0, _WGMMA_128), (1.2, _WIDEST))),
    (_MOST_TOKENS, ((1.0, _WIDEST),)),
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
    fitting = [(time, fitted(plan, layout)) for time, plan in candidates]
    return min(fitting, key=lambda item: item[0] * _block_steps(item[1], tokens, layout, gpu))[1]


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

    Codes of 8 bits fill twice the registers: half as many are kept on their way, or as many as one
    chunk of up to four pieces has.
    """
    if isinstance(plan, MmaPlan):
        whole = _in_whole_chunks(plan.pieces, layout) and layout.bits == 4
        return plan if whole else replace(plan, pieces=1)
    codes = plan.depth * plan.pieces  # pieces of them on their way
    if layout.bits == 8:
        codes = max(codes // 2, min(plan.pieces, 4))
    fits = (n for n in (8, 4, 2) if n <= min(plan.pieces, codes) and _in_whole_chunks(n, layout))
    pieces = next(fits, 1)
    return replace(
        plan, pieces=pieces, depth=codes // pieces, buffers=plan.buffers * plan.pieces // pieces
    )


def _in_whole_chunks(pieces: int, layout: Layout) -> bool:
    chunk, size = pieces * PIECE, layout.group_size
    several = size in SHORT_GROUPS and chunk % size == 0  # see group_define
    aligned = layout.groups == 1 or size % chunk == 0 or several
    return layout.rows % chunk == 0 and aligned


def _block_steps(plan: Plan, tokens: int, layout: Layout, gpu: Gpu) -> float:
    """How long the longest multiprocessor works, in steps of 128 inputs of one block."""
    slots, steps = gpu.multiprocessors * plan.min_blocks, layout.rows / 128
    if isinstance(plan, MmaPlan):
        across, down = plan.grid(tokens, layout.tiles)
        return -(-across * down // slots) * (steps / plan.slices + plan.overhead)
    shares = shares_of(plan, tokens, layout.tiles, layout.rows, gpu)
    whole = -(-shares.whole // slots) * (steps + plan.overhead)
    return whole + _shared_steps(plan, shares.shared, shares.parts, layout.rows, gpu)


def most_shared(gpu: Gpu) -> int:
    """Tiles, of one product."""
    return gpu.multiprocessors * max(p.min_blocks for p in ALL_PLANS if isinstance(p, HopperPlan))


@lru_cache(maxsize=4096)
def shares_of(plan: HopperPlan, tokens: int, tiles: int, rows: int, gpu: Gpu) -> Shares:
    """Tiles beyond the last full wave of blocks are shared by as many as finish first."""
    slots, blocks = gpu.multiprocessors * plan.min_blocks, plan.blocks(tokens, tiles)
    rest = blocks % slots
    if rest == 0:
        return Shares(blocks)
    # Each part has a chunk at least, and what is added up fits the L2.
    most = min(rows // (PIECE * plan.pieces), _MOST_WAVES * slots // rest, _MOST_PARTS)
    parts = min(range(1, most + 1), key=lambda n: _shared_steps(plan, rest, n, rows, gpu))
    return Shares(blocks - rest, rest, parts) if parts > 1 else Shares(blocks)


def _shared_steps(plan: HopperPlan, tiles: int, parts: int, rows: int, gpu: Gpu) -> float:
    """_block_steps of tiles that so many blocks share."""
    waves = -(-tiles * parts // (gpu.multiprocessors * plan.min_blocks))
    adding = _ADDING / plan.min_blocks * parts if parts > 1 else 0
    return waves * (rows / 128 / parts + plan.overhead) + adding
