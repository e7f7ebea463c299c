"""The kernels of dense.cu: inputs made ready for a packed matrix, and its product by cuBLAS."""

from __future__ import annotations

import ctypes

import torch

from nybble.kernels.cuda.arranged import arranged, rows_of
from nybble.kernels.cuda.launch import Kernel, kernel, pointers
from nybble.kernels.cuda.packing import PIECE, TILE, PackedMatrix
from nybble.kernels.cuda.plans import inverse, matrix_defines
from nybble.kernels.cuda.precision import sums_in_fp32

_THREADS = 256  # of the kernels in dense.cu
# Dequantised weights alive at a time. The 72B's qkv and down fit, so that their outputs are
# contiguous, which lets cuBLAS add the bias; see docs/decisions/003.
SLAB_BYTES = 400 << 20


class _DequantizeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros", "dense")),
        *((name, ctypes.c_int) for name in ("first_tile", "pieces", "groups", "slab_tiles")),
        ("pieces_per_group", ctypes.c_uint),
    )


class _GatherArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "index", "out")),
        *((name, ctypes.c_int) for name in ("x_stride", "k")),
    )


class _ArrangeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int) for name in ("x_stride", "tokens", "rows")),
    )


class _SiluArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate_up", "residual", "y")),
        *((name, ctypes.c_int) for name in ("width", "columns", "y_stride")),
    )


class DenseKernels:
    """Those of one matrix. dtype: of activations and bias; dependent: see Kernel.launch."""

    def __init__(
        self,
        matrix: PackedMatrix,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        dependent: bool,
    ) -> None:
        self.matrix, self.dtype = matrix, dtype
        self.device = matrix.words.device
        self._bias, self._dependent = bias, dependent
        self._kernels: dict[str, Kernel] = {}

    def dequantize(self, first_tile: int = 0, tiles: int | None = None) -> torch.Tensor:
        """Tiles of the matrix as a dense (rows of N, K padded) tensor, rounded to `dtype`.

        Where the matrix is paired, the gate rows of these tiles come first, then the up rows.
        """
        m = self.matrix
        count = m.tiles - first_tile if tiles is None else tiles
        dense = torch.empty(count * TILE, m.rows, dtype=self.dtype, device=self.device)
        arguments = _DequantizeArguments(
            *pointers(m.words, m.scales, m.zeros, dense),
            *(first_tile, m.pieces, m.groups, count, inverse(max(1, m.group_size // PIECE))),
        )
        self._launch("dequantize", (-(-count * m.pieces // (_THREADS // 32)), 1), arguments)
        return dense

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, K) in the order of the matrix's rows, padded to whole pieces, aligned."""
        if self.matrix.gather is not None:
            return self._gathered(x, self.matrix.gather)
        return _aligned(x)

    def arrange(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """x (tokens, K), or arranged already, in whole blocks of tokens for gemm_hopper.cu."""
        if x.dim() == 3:
            return x
        x = self.plain(x)
        tokens = x.shape[0]
        out = arranged(tokens, self.matrix.rows, -(-tokens // block) * block, x)
        arguments = _ArrangeArguments(*pointers(x, out), x.stride(0), tokens, rows_of(out))
        self._launch("arrange", (-(-tokens // 64), self.matrix.pieces), arguments)
        return out

    def _gathered(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        tokens, k = x.shape[0], self.matrix.rows
        out = torch.empty(tokens, k, dtype=x.dtype, device=x.device)
        arguments = _GatherArguments(*pointers(x, index, out), x.stride(0), k)
        self._launch("gather", (tokens, -(-k // _THREADS)), arguments)
        return out

    def product(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Of x as `plain` makes it: dequantise a slab, multiply by cuBLAS. See CudaLinear."""
        m = self.matrix
        add = residual is not None and not m.paired
        y = x.new_empty(x.shape[0], m.outputs) if residual is None or m.paired else residual
        columns = TILE // 2 if m.paired else TILE
        step = max(1, SLAB_BYTES // (TILE * m.rows * self.dtype.itemsize))
        with sums_in_fp32():
            for first in range(0, m.tiles, step):
                count = min(step, m.tiles - first)
                dense = self.dequantize(first, count)
                part = slice(first * columns, min((first + count) * columns, m.outputs))
                if m.paired:
                    added = None if residual is None else residual[:, part]
                    self._paired_slab(x, dense, first, y[:, part], added)
                else:
                    self._plain_slab(x, dense, y[:, part], part, add=add)
        return y

    def _plain_slab(
        self, x: torch.Tensor, dense: torch.Tensor, y: torch.Tensor, part: slice, *, add: bool
    ) -> None:
        """add: to what y holds, which spares cuBLAS a copy of it."""
        weight = dense[: y.shape[1]].t()
        bias = None if self._bias is None else self._bias[part]
        if add:
            y.addmm_(x, weight)
            if bias is not None:
                y += bias
        elif bias is not None:
            torch.addmm(bias, x, weight, out=y)
        else:
            torch.mm(x, weight, out=y)

    def _paired_slab(
        self,
        x: torch.Tensor,
        dense: torch.Tensor,
        first_tile: int,
        y: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        """y and residual are columns of tensors of the same shape, so of one row stride."""
        gate_up = torch.mm(x, dense.t())  # (tokens, gate rows then up rows of this slab)
        width = dense.shape[0] // 2
        if self._bias is not None:
            halves = self._bias.view(2, self.matrix.outputs)[
                :, first_tile * 8 : first_tile * 8 + width
            ]
            gate_up.view(-1, 2, width)[:, :, : halves.shape[1]] += halves
        arguments = _SiluArguments(*pointers(gate_up, residual, y), width, y.shape[1], y.stride(0))
        blocks = -(-y.shape[1] // (8 * _THREADS))
        self._launch("silu_mul", (x.shape[0], blocks), arguments)

    def _launch(self, name: str, grid: tuple[int, int], arguments: ctypes.Structure) -> None:
        """One of the kernels in dense.cu."""
        if name not in self._kernels:
            defines = tuple(sorted(matrix_defines(self.matrix, self.dtype, 1).items()))
            self._kernels[name] = kernel("dense.cu", name, defines, self.device)
        self._kernels[name].launch(grid, _THREADS, arguments, dependent=self._dependent)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
