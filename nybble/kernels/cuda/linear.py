"""A quantised matrix on an NVIDIA GPU, multiplied by the kernel that is fastest for the batch."""

from __future__ import annotations

import ctypes

import torch

from nybble.errors import ConfigError
from nybble.kernels.cuda.arranged import arranged, rows_of
from nybble.kernels.cuda.dense import DenseKernels
from nybble.kernels.cuda.launch import Kernel, kernel, pointers
from nybble.kernels.cuda.packing import PIECE, PackedMatrix, pack
from nybble.kernels.cuda.plans import (
    Gpu,
    HopperPlan,
    MmaPlan,
    Plan,
    inverse,
    layout_of,
    matrix_defines,
    most_shared,
    plan_for,
    shares_of,
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
    Two streams must not run one instance at a time: blocks that share a tile count in one place.
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
        self._weights = pointers(packed.words, packed.scales, packed.zeros)
        shared = most_shared(self.gpu) if self.gpu.hopper else 0
        self._arrived = torch.zeros(shared, dtype=torch.int32, device=self.device)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x (tokens, K) or arranged; residual like the result, added to it in fp32, and perhaps
        overwritten."""
        tokens = self._check(x, residual)
        if tokens == 0:
            return x.new_empty(0, self.outputs)
        residual = None if residual is None else _contiguous(residual)
        plan = self._plan_for(tokens)
        if plan is None:
            return self.dense.product(self.dense.plain(x), residual)
        y = torch.empty(tokens, self.outputs, dtype=self.dtype, device=self.device)
        self._multiply(x, residual, y, plan)
        return y

    def arranged_rows(self, tokens: int) -> int:
        """How many rows inputs must have that come arranged; 0 where they must come plain.

        Arranged inputs spare a copy: (K / 64, tokens, 64), in the order of arranged.cuh, a view
        of so many rows.
        """
        plan = self._plan_for(tokens)
        if self.matrix.gather is not None or plan is None or isinstance(plan, MmaPlan):
            return 0
        return -(-tokens // plan.tokens) * plan.tokens

    def swiglu(self, x: torch.Tensor, arranged_rows: int) -> torch.Tensor:
        """Of gate and up (`paired`, without a bias), for a linear that takes so many rows:
        arranged, where the kernel can do that in passing."""
        tokens = self._check(x, None)
        plan = self._plan_for(tokens)
        if not arranged_rows or not isinstance(plan, HopperPlan):
            return self(x)
        y = arranged(tokens, self.outputs, arranged_rows, x)
        self._multiply(x, None, y, plan)
        return y

    def _plan_for(self, tokens: int) -> Plan | None:
        return self._plan or plan_for(tokens, self.layout, self.gpu)

    def _check(self, x: torch.Tensor, residual: torch.Tensor | None) -> int:
        """The tokens of x, or ConfigError."""
        k, tokens = self.matrix.in_features, x.shape[-2] if x.dim() in (2, 3) else 0
        whole = self._is_arranged(x) if x.dim() == 3 else x.dim() == 2 and x.shape[1] == k
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

    def _is_arranged(self, x: torch.Tensor) -> bool:
        shape, rows = (self.matrix.in_features // PIECE, PIECE), self.arranged_rows(x.shape[1])
        return (x.shape[0], x.shape[2]) == shape and rows > 0 and rows_of(x) == rows

    def _multiply(
        self, x: torch.Tensor, residual: torch.Tensor | None, y: torch.Tensor, plan: Plan
    ) -> None:
        """y (tokens, N); arranged, if a Hopper plan makes silu(gate) * up."""
        if isinstance(plan, MmaPlan):
            x = self.dense.plain(x)
            values = self._values(x, x.stride(0), residual, y, plan)
            self._launch(plan, plan.grid(y.shape[0], self.layout.tiles), _GemmArguments(*values))
            return
        x = self.dense.arrange(x, plan.tokens)
        shares = shares_of(plan, x.shape[1], self.layout.tiles, self.layout.rows, self.gpu)
        count = plan.scratch_floats(shares)
        scratch = torch.empty(count, dtype=torch.float32, device=self.device) if count else None
        arguments = _HopperArguments(
            *self._values(x, rows_of(x), residual, y, plan),
            *pointers(scratch, self._arrived),
            *(shares.whole, shares.parts, rows_of(y) if y.dim() == 3 else 0),
        )
        self._launch(plan, (shares.blocks, 1), arguments)

    def _values(
        self,
        x: torch.Tensor,
        x_stride: int,
        residual: torch.Tensor | None,
        y: torch.Tensor,
        plan: Plan,
    ) -> tuple[int | None, ...]:
        """The fields of _GemmArguments."""
        of, chunk = self.layout, plan.pieces * PIECE
        return (
            *self._weights,
            *pointers(x, self._bias, residual, y),
            *(y.shape[-2], x_stride, self.outputs, of.tiles),
            *(of.rows // chunk, of.groups, inverse(max(1, of.group_size // chunk))),
        )

    def _launch(self, plan: Plan, grid: tuple[int, int], arguments: ctypes.Structure) -> None:
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


def _contiguous(residual: torch.Tensor) -> torch.Tensor:
    """Copied unless it is, and the kernels can read several numbers of it at once."""
    fits = residual.is_contiguous() and residual.data_ptr() % 16 == 0
    return residual if fits else residual.clone(memory_format=torch.contiguous_format)
