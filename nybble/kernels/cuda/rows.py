"""Operations on rows of fp16 or bf16 activations: fp32 inside, one pass over memory.

No dependent launch: started early, their large blocks wait where those of the product before could
run, which cost 2 to 3 ms of a step of 8 or 16 tokens of the 72B.
"""

from __future__ import annotations

import ctypes

import torch

from nybble.errors import ConfigError
from nybble.kernels.backend import Partial
from nybble.kernels.cuda.arranged import arranged
from nybble.kernels.cuda.launch import Kernel, kernel

_VECTOR = 8  # elements of a 16-byte load
_SHORT = 512  # rows up to this long are a warp's, and share blocks
_SHORT_ROWS = 8
# One row: many threads, for the shortest way. Many rows: few, so that more rows are in flight.
_MOST_THREADS, _FEW_THREADS, _MANY_ROWS = 1024, 256, 512
_SILU_THREADS = _EMBED_THREADS = _MERGE_THREADS = 256


class _NormArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
        *((name, ctypes.c_long) for name in ("token_stride", "head_stride")),
        *((name, ctypes.c_int) for name in ("rows", "heads", "dim", "y_rows")),
        ("eps", ctypes.c_float),
    )


class _SiluArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate_up", "y")),
        *((name, ctypes.c_long) for name in ("row_stride", "count")),
        ("width", ctypes.c_int),
    )


class _EmbedArguments(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("ids", "table", "y")), ("dim", ctypes.c_int))


class _MergeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_lse", "b_lse", "y")),
        *(("count", ctypes.c_long), ("dim", ctypes.c_int)),
    )


class RowKernels:
    """The row kernels of one device, for one dtype. Launches can be captured in a CUDA graph."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._kernels: dict[tuple[str, int, int, int], Kernel] = {}

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, arranged_rows: int = 0
    ) -> torch.Tensor:
        """See Backend.rms_norm; x (tokens, heads, dim) may be a view with strides.

        arranged_rows: of x (tokens, dim), the result is arranged, see CudaLinear.arranged_rows.
        """
        dim = x.shape[-1]
        self._check(x, dim)
        self._check(weight, dim)
        x = _vectors(x) if x.dim() in (2, 3) else x.reshape(-1, dim).contiguous()
        if arranged_rows:
            y = arranged(x.shape[0], dim, arranged_rows, x)
        else:
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel() == 0:
            return y
        rows = x.numel() // dim
        heads, head_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
        arguments = _NormArguments(
            *(x.data_ptr(), weight.data_ptr(), y.data_ptr()),
            *(x.stride(0), head_stride, rows, heads, dim, arranged_rows, eps),
        )
        if dim <= _SHORT:
            threads, per_block = 32, _SHORT_ROWS
        else:
            most = _MOST_THREADS if rows < _MANY_ROWS else _FEW_THREADS
            threads, per_block = min(most, -(-dim // (32 * _VECTOR)) * 32), 1
        run = self._kernel("rms_norm", threads, per_block, -(-dim // (threads * _VECTOR)))
        blocks = -(-rows // per_block)
        run.launch((blocks, 1), threads * per_block, arguments, dependent=False)
        return y

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of a table in pinned main memory, which the GPU reads across the bus."""
        tokens, dim = len(ids), table.shape[1]
        if table.dtype != self.dtype or not table.is_pinned() or not table.is_contiguous():
            raise ConfigError(
                f"An embedding in main memory must be pinned and {self.dtype}, not "
                f"{table.dtype}: load the model with it on the GPU."
            )
        self._check_width(dim)
        y = torch.empty(tokens, dim, dtype=self.dtype, device=self.device)
        if tokens:
            arguments = _EmbedArguments(ids.data_ptr(), table.data_ptr(), y.data_ptr(), dim)
            run = self._kernel("embed", _EMBED_THREADS, 1, 1)
            blocks = -(-dim // (_VECTOR * _EMBED_THREADS))
            run.launch((tokens, blocks), _EMBED_THREADS, arguments, dependent=False)
        return y

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Backend.silu_mul."""
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        self._check(gate_up, width)
        gate_up = _vectors(gate_up)
        y = torch.empty(tokens, width, dtype=self.dtype, device=self.device)
        count = tokens * width // _VECTOR
        if count:
            arguments = _SiluArguments(
                gate_up.data_ptr(), y.data_ptr(), gate_up.stride(0), count, width
            )
            run = self._kernel("silu_mul", _SILU_THREADS, 1, 1)
            blocks = -(-count // _SILU_THREADS)
            run.launch((blocks, 1), _SILU_THREADS, arguments, dependent=False)
        return y

    def merge_attention(self, first: Partial, second: Partial) -> torch.Tensor:
        """See Backend.merge_attention; what PagedAttention.partial returns, twice."""
        (a, a_lse), (b, b_lse) = first, second
        dim = a.shape[1] // a_lse.shape[1]
        for x in (a, b):
            self._check(x, dim)
        y = torch.empty_like(b)
        count = y.numel() // _VECTOR
        if count:
            pointers = (x.data_ptr() for x in (a, b, a_lse, b_lse, y))
            run = self._kernel("merge_attention", _MERGE_THREADS, 1, 1)
            blocks = -(-count // _MERGE_THREADS)
            arguments = _MergeArguments(*pointers, count, dim)
            run.launch((blocks, 1), _MERGE_THREADS, arguments, dependent=False)
        return y

    def _check(self, x: torch.Tensor, dim: int) -> None:
        if x.dtype != self.dtype or x.device != self.device:
            raise ConfigError(
                f"The CUDA kernels were made for {self.dtype} on {self.device}, got {x.dtype} on "
                f"{x.device}: convert it."
            )
        self._check_width(dim)

    @staticmethod
    def _check_width(dim: int) -> None:
        if dim % _VECTOR:
            raise ConfigError(
                f"The CUDA kernels take rows of a multiple of {_VECTOR} numbers, not {dim}: "
                "run this model with the 'ref' kernels."
            )

    def _kernel(self, name: str, threads: int, rows: int, rounds: int) -> Kernel:
        key = name, threads, rows, rounds
        if key not in self._kernels:
            defines = (
                ("BF16", int(self.dtype == torch.bfloat16)),
                ("ROUNDS", rounds),
                ("ROWS", rows),
                ("THREADS", threads),
            )
            self._kernels[key] = kernel("rows.cu", name, defines, self.device)
        return self._kernels[key]


def _vectors(x: torch.Tensor) -> torch.Tensor:
    """x, copied unless each row of its last dimension can be read 16 bytes at a time."""
    even = all(stride % _VECTOR == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and even and x.data_ptr() % 16 == 0 else x.contiguous()
