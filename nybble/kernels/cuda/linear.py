"""A quantised matrix on an NVIDIA GPU, multiplied by the kernel that is fastest for the batch."""

from __future__ import annotations

import ctypes

import torch

from nybble.errors import ConfigError
from nybble.kernels.cuda.arranged import arranged, rows_of
from nybble.kernels.cuda.dense import DenseKernels
from nybble.kernels.cuda.launch import Kernel, kernel
from nybble.kernels.cuda.packing import PIECE, PackedMatrix, pack
from nybble.kernels.cuda.plans import (
    Gpu,
    HopperPlan,
    MmaPlan,
    Plan,
    inverse,
    layout_of,
    matrix_defines,
    plan_for,
)
from nybble.kernels.matrix import QuantMatrix


class _GemmArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros")),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("tokens", "x_stride", "outputs", "tiles")),
        *((name, ctypes.c_int) for name in ("chunks", "groups")),
        ("chunks_per_group", ctypes.c_uint),
    )


class _HopperArguments(ctypes.Structure):
    _fields_ = (
        *_GemmArguments._fields_,
        *((name, ctypes.c_void_p) for name in ("scratch", "arrived")),
        *((name, ctypes.c_int) for name in ("whole", "parts", "y_rows")),
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
        self.outputs = packed.outputs
        self._bias = None if bias is None else bias.to(self.device, dtype).contiguous()
        properties = torch.cuda.get_device_properties(self.device)
        self._dependent = properties.major >= 9 if dependent is None else dependent
        self.gpu = Gpu(properties.multi_processor_count, hopper=properties.major == 9)
        self.layout = layout_of(packed, dtype)
        self._plan = plan
        self.dense = DenseKernels(packed, self._bias, dtype, dependent=self._dependent)
        self._kernels: dict[Plan, Kernel] = {}
        slots = properties.multi_processor_count if self.gpu.hopper else 0
        self._arrived = torch.zeros(slots, dtype=torch.int32, device=self.device)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x (tokens, K) or arranged; residual like the result, added to it in fp32, and perhaps
        overwritten."""
        tokens = self._check(x, residual)
        if tokens == 0:
            return x.new_empty(0, self.outputs)
        residual = None if residual is None else residual.contiguous()
        plan = self._plan_for(tokens)
        if plan is None:
            return self.dense.product(self.dense.plain(x), residual)
        y = torch.empty(tokens, self.outputs, dtype=self.dtype, device=self.device)
        if isinstance(plan, MmaPlan):
            self._packed_product(self.dense.plain(x), residual, y, plan)
        else:
            self._packed_product(self.dense.arrange(x, plan.tokens), residual, y, plan)
        return y

    def arranged_rows(self, tokens: int) -> int:
        """So many rows have inputs that spare a copy where they come arranged; 0: any other do.

        Arranged are (K / 64, tokens, 64), in the order of arranged.cuh, a view of so many rows.
        """
        plan = self._plan_for(tokens)
        if self.matrix.gather is not None or plan is None or isinstance(plan, MmaPlan):
            return 0
        return -(-tokens // plan.tokens) * plan.tokens

    def swiglu(self, x: torch.Tensor, arranged_rows: int) -> torch.Tensor:
        """Of gate and up (`paired`, no bias); arranged where the kernel can do that in passing."""
        tokens = self._check(x, None)
        plan = self._plan_for(tokens)
        if not arranged_rows or not isinstance(plan, HopperPlan) or plan.split > 1:
            return self(x)
        y = arranged(tokens, self.outputs, arranged_rows, x)
        self._packed_product(self.dense.arrange(x, plan.tokens), None, y, plan)
        return y

    def _plan_for(self, tokens: int) -> Plan | None:
        return self._plan or plan_for(tokens, self.layout, self.gpu)

    def _check(self, x: torch.Tensor, residual: torch.Tensor | None) -> int:
        """The tokens of x, or ConfigError."""
        k = self.matrix.in_features
        *pieces, tokens, inputs = x.shape if x.dim() in (2, 3) else (0, 0, 0)
        whole = inputs == k if not pieces else (pieces[0], inputs) == (k // PIECE, PIECE)
        if not whole or x.dtype != self.dtype or x.device != self.device:
            raise ConfigError(
                f"This linear takes (tokens, {k}) of {self.dtype} on {self.device}, got "
                f"{tuple(x.shape)} of {x.dtype} on {x.device}: convert the input."
            )
        expected = (tokens, self.outputs)
        if residual is not None and (
            tuple(residual.shape) != expected
            or residual.dtype != x.dtype
            or residual.device != x.device
        ):
            raise ConfigError(
                f"The residual must be {expected} of {x.dtype} on {x.device}, got "
                f"{tuple(residual.shape)} of {residual.dtype} on {residual.device}: convert it."
            )
        return tokens

    def _packed_product(
        self, x: torch.Tensor, residual: torch.Tensor | None, y: torch.Tensor, plan: Plan
    ) -> None:
        """x as the plan's kernel reads it; y (tokens, N), or arranged."""
        m, chunk = self.matrix, plan.pieces * PIECE
        tokens, stride = y.shape[-2], x.stride(0) if x.dim() == 2 else rows_of(x)
        values = (
            *_pointers(m.words, m.scales, m.zeros, x, self._bias, residual, y),
            *(tokens, stride, self.outputs, m.tiles),
            *(m.rows // chunk, m.groups, inverse(max(1, m.group_size // chunk))),
        )
        arguments: ctypes.Structure
        if isinstance(plan, HopperPlan):
            shares = plan.shares(tokens, m.tiles, m.rows, self.gpu.multiprocessors)
            scratch = torch.empty(plan.scratch_floats(shares), device=self.device)
            arguments = _HopperArguments(
                *(*values, *_pointers(scratch, self._arrived)),
                *(shares.whole, shares.parts),
                rows_of(y) if y.dim() == 3 else 0,
            )
            grid = (shares.blocks * plan.split, 1)
        else:
            arguments, grid = _GemmArguments(*values), plan.grid(tokens, m.tiles)
        self.load(plan).launch(grid, plan.threads, arguments, dependent=self._dependent)

    def load(self, plan: Plan) -> Kernel:
        """The kernel of a plan; the first time it is compiled and loaded."""
        if plan not in self._kernels:
            defines = matrix_defines(self.matrix, self.dtype, plan.pieces) | plan.defines()
            items = tuple(sorted(defines.items()))
            self._kernels[plan] = kernel(
                f"{plan.name}.cu", plan.name, items, self.device, plan.shared_bytes
            )
        return self._kernels[plan]


def _pointers(*tensors: torch.Tensor | None) -> tuple[int | None, ...]:
    return tuple(None if t is None else t.data_ptr() for t in tensors)
