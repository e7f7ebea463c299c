"""A quantised matrix on an NVIDIA GPU, multiplied by the kernel that is fastest for the batch."""

from __future__ import annotations

import ctypes

import torch

from nybble.errors import ConfigError
from nybble.kernels.cuda.launch import Kernel, kernel
from nybble.kernels.cuda.packing import PIECE, TILE, PackedMatrix, pack
from nybble.kernels.cuda.plans import (
    Gpu,
    HopperPlan,
    Layout,
    Plan,
    group_define,
    inverse,
    plan_for,
)
from nybble.kernels.cuda.precision import sums_in_fp32
from nybble.kernels.matrix import QuantMatrix

_THREADS = 256  # of the kernels in dense.cu
_SCALE_CODES = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}
# Dequantised weights alive at a time. The 72B's qkv and down fit, so that their outputs are
# contiguous, which lets cuBLAS add the bias; see docs/decisions/003.
SLAB_BYTES = 400 << 20


class _GemmArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros")),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("tokens", "x_stride", "outputs", "tiles")),
        *((name, ctypes.c_int) for name in ("chunks", "groups")),
        ("chunks_per_group", ctypes.c_uint),
    )


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
        *((name, ctypes.c_int) for name in ("x_stride", "tokens", "pieces", "rows")),
    )


class _SiluArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate_up", "residual", "y")),
        *((name, ctypes.c_int) for name in ("width", "columns", "y_stride")),
    )


class CudaLinear:
    """y = x W + bias (+ residual), or silu(gate) * up where the matrix is `paired`.

    x is (tokens, K) of `dtype` (fp16 or bf16), y (tokens, N), or (tokens, N / 2) where paired.
    Sums are in fp32. `dependent` uses programmatic dependent launch; by default wherever the
    GPU has it. Calls can be captured in a CUDA graph once one call of that batch size was made.
    plan: one that fits the matrix (plans.fitted), for every batch in place of the table's.
    """

    def __init__(
        self,
        matrix: QuantMatrix | PackedMatrix,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float16,
        paired: bool = False,
        dependent: bool | None = None,
        plan: Plan | None = None,
    ) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(f"The CUDA kernels take fp16 and bf16 activations, not {dtype}.")
        packed = matrix if isinstance(matrix, PackedMatrix) else pack(matrix, paired=paired)
        self.matrix = packed
        self.dtype = dtype
        self.device = packed.words.device
        self.outputs = packed.out_features // 2 if packed.paired else packed.out_features
        self._bias = None if bias is None else bias.to(self.device, dtype).contiguous()
        properties = torch.cuda.get_device_properties(self.device)
        self._dependent = properties.major >= 9 if dependent is None else dependent
        self.gpu = Gpu(properties.multi_processor_count, hopper=properties.major == 9)
        self.layout = layout_of(packed, dtype)
        self._plan = plan
        self._kernels: dict[Plan | str, Kernel] = {}

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x (tokens, K); residual like the result, added to it in fp32, and perhaps overwritten."""
        self._check(x, residual)
        tokens = x.shape[0]
        if tokens == 0:
            return x.new_empty(0, self.outputs)
        plan = self._plan or plan_for(tokens, self.layout, self.gpu)
        if plan is None:
            return self._dense_product(self._plain_inputs(x), residual)
        if isinstance(plan, HopperPlan):
            inputs = self._arranged_inputs(x, plan.tokens)
        else:
            inputs = self._plain_inputs(x)
        return self._packed_product(inputs, tokens, residual, plan)

    def dequantize(self, first_tile: int = 0, tiles: int | None = None) -> torch.Tensor:
        """Tiles of the matrix as a dense (rows of N, K padded) tensor, rounded to `dtype`.

        Where the matrix is paired, the gate rows of these tiles come first, then the up rows.
        """
        m = self.matrix
        count = m.tiles - first_tile if tiles is None else tiles
        dense = torch.empty(count * TILE, m.rows, dtype=self.dtype, device=self.device)
        arguments = _DequantizeArguments(
            *_pointers(m.words, m.scales, m.zeros, dense),
            *(first_tile, m.pieces, m.groups, count, inverse(max(1, m.group_size // PIECE))),
        )
        self._launch("dequantize", (-(-count * m.pieces // (_THREADS // 32)), 1), arguments)
        return dense

    def _check(self, x: torch.Tensor, residual: torch.Tensor | None) -> None:
        k = self.matrix.in_features
        if x.dim() != 2 or x.shape[1] != k or x.dtype != self.dtype or x.device != self.device:
            raise ConfigError(
                f"This linear takes (tokens, {k}) of {self.dtype} on {self.device}, got "
                f"{tuple(x.shape)} of {x.dtype} on {x.device}: convert the input."
            )
        expected = (x.shape[0], self.outputs)
        if residual is not None and (
            tuple(residual.shape) != expected
            or residual.dtype != x.dtype
            or residual.device != x.device
        ):
            raise ConfigError(
                f"The residual must be {expected} of {x.dtype} on {x.device}, got "
                f"{tuple(residual.shape)} of {residual.dtype} on {residual.device}: convert it."
            )

    def _plain_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """x in the order of the matrix's rows, padded to whole pieces, rows 16-byte aligned."""
        if self.matrix.gather is not None:
            return self._gathered(x, self.matrix.gather)
        return _aligned(x)

    def _arranged_inputs(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """The same as the Hopper kernel reads it, padded to blocks of tokens: see dense.cu."""
        x = self._plain_inputs(x)
        (tokens, _), pieces = x.shape, self.matrix.pieces
        rows = -(-tokens // block) * block
        out = torch.empty(pieces, rows, PIECE, dtype=x.dtype, device=x.device)
        arguments = _ArrangeArguments(*_pointers(x, out), x.stride(0), tokens, pieces, rows)
        self._launch("arrange", (-(-tokens // 16), -(-pieces // 8)), arguments)
        return out

    def _gathered(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        tokens, k = x.shape[0], self.matrix.rows
        out = torch.empty(tokens, k, dtype=x.dtype, device=x.device)
        arguments = _GatherArguments(*_pointers(x, index, out), x.stride(0), k)
        self._launch("gather", (tokens, -(-k // _THREADS)), arguments)
        return out

    def _packed_product(
        self, x: torch.Tensor, tokens: int, residual: torch.Tensor | None, plan: Plan
    ) -> torch.Tensor:
        m, stride = self.matrix, x.shape[1] if x.dim() == 3 else x.stride(0)
        y = torch.empty(tokens, self.outputs, dtype=self.dtype, device=self.device)
        residual = None if residual is None else residual.contiguous()
        chunk = plan.pieces * PIECE
        arguments = _GemmArguments(
            *_pointers(m.words, m.scales, m.zeros, x, self._bias, residual, y),
            *(tokens, stride, self.outputs, m.tiles),
            *(m.rows // chunk, m.groups, inverse(max(1, m.group_size // chunk))),
        )
        grid = plan.grid(tokens, m.tiles)
        self.load(plan).launch(grid, plan.threads, arguments, dependent=self._dependent)
        return y

    def load(self, plan: Plan) -> Kernel:
        """The kernel of a plan; the first time it is compiled and loaded."""
        if plan not in self._kernels:
            self._kernels[plan] = self._kernel(
                plan.name, plan.name, plan.pieces, plan.defines(), plan.shared_bytes
            )
        return self._kernels[plan]

    def _dense_product(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """For batches that are bound by arithmetic: dequantise a slab, multiply by cuBLAS."""
        m = self.matrix
        residual = None if residual is None else residual.contiguous()
        add = residual is not None and not m.paired
        y = x.new_empty(x.shape[0], self.outputs) if residual is None or m.paired else residual
        columns = TILE // 2 if m.paired else TILE
        step = max(1, SLAB_BYTES // (TILE * m.rows * self.dtype.itemsize))
        with sums_in_fp32():
            for first in range(0, m.tiles, step):
                count = min(step, m.tiles - first)
                dense = self.dequantize(first, count)
                part = slice(first * columns, min((first + count) * columns, self.outputs))
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
            halves = self._bias.view(2, self.outputs)[:, first_tile * 8 : first_tile * 8 + width]
            gate_up.view(-1, 2, width)[:, :, : halves.shape[1]] += halves
        arguments = _SiluArguments(*_pointers(gate_up, residual, y), width, y.shape[1], y.stride(0))
        blocks = -(-y.shape[1] // (8 * _THREADS))
        self._launch("silu_mul", (x.shape[0], blocks), arguments)

    def _launch(self, name: str, grid: tuple[int, int], arguments: ctypes.Structure) -> None:
        """One of the kernels in dense.cu."""
        if name not in self._kernels:
            self._kernels[name] = self._kernel("dense", name, 1, {}, 0)
        self._kernels[name].launch(grid, _THREADS, arguments, dependent=self._dependent)

    def _kernel(
        self, source: str, name: str, pieces: int, shape: dict[str, int], shared_bytes: int
    ) -> Kernel:
        m = self.matrix
        defines = {
            "BITS": m.bits,
            "BF16": int(self.dtype == torch.bfloat16),
            "SCALE": _SCALE_CODES[m.scales.dtype],
            "ASYM": int(m.zeros is not None),
            "PAIRED": int(m.paired),
            "GROUP": group_define(self.layout, pieces),
            **shape,
        }
        items = tuple(sorted(defines.items()))
        return kernel(f"{source}.cu", name, items, self.device, shared_bytes)


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


def _aligned(x: torch.Tensor) -> torch.Tensor:
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _pointers(*tensors: torch.Tensor | None) -> tuple[int | None, ...]:
    return tuple(None if t is None else t.data_ptr() for t in tensors)
