"""The decoder's operations on an NVIDIA GPU of compute capability 8.0 or later."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nybble.errors import ConfigError
from nybble.kernels import ref
from nybble.kernels.backend import Batch, Choice, KVLayer, LinearFn, Partial
from nybble.kernels.cuda.attention import PagedAttention
from nybble.kernels.cuda.compiler import binding, version
from nybble.kernels.cuda.linear import CudaLinear
from nybble.kernels.cuda.packing import refusal
from nybble.kernels.cuda.precision import sums_in_fp32
from nybble.kernels.cuda.rows import RowKernels
from nybble.kernels.matrix import QuantMatrix

_LEAST_CAPABILITY = (8, 0)


class CudaBackend:
    """fp16 or bf16 activations, sums in fp32. Every operation can be captured in a CUDA graph.

    Runs on one stream at a time. Raises ConfigError where the GPU or its bindings do not serve.
    """

    name = "cuda"

    def __init__(self, device: torch.device | str, dtype: torch.dtype = torch.float16) -> None:
        _check_device()
        index = torch.device(device).index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        _check_capability(self.device)
        if dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(
                f"The CUDA kernels compute with fp16 and bf16 activations, not {dtype}: "
                "choose one of them, or the 'ref' kernels."
            )
        self.dtype = dtype
        self._rows = RowKernels(self.device, dtype)
        self._attention = PagedAttention(self.device, dtype)

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if table.is_cuda:
            return F.embedding(ids, table).to(self.dtype)
        return self._rows.embed(ids, table)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._rows.rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._rows.silu_mul(gate_up)

    def rope_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: KVLayer,
        batch: Batch,
    ) -> torch.Tensor:
        return self._attention.rope_store(q, k, v, cos, sin, layer, batch)

    def attention(
        self,
        q: torch.Tensor,
        layer: KVLayer,
        batch: Batch,
        scale: float,
        reader: LinearFn | None = None,
    ) -> torch.Tensor:
        rows = 0 if reader is None else _arranged_rows(reader, q.shape[0])
        return self._attention(q, layer, batch, scale, rows)

    def partial_attention(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, *, closed: bool
    ) -> Partial:
        return self._attention.partial(q, layer, batch, scale, closed=closed)

    def merge_attention(self, first: Partial, second: Partial) -> torch.Tensor:
        return self._rows.merge_attention(first, second)

    def choose(self, matrix: QuantMatrix) -> Choice:
        reason = refusal(matrix)
        return (
            Choice("cuda") if reason is None else Choice("torch-dequantised", (f"cuda: {reason}",))
        )

    def quant_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        if refusal(matrix) is None:
            return CudaLinear(matrix, bias, dtype=self.dtype)
        dense = self.dense_linear(ref.dequantize(matrix).t(), bias)
        return lambda x: dense(ref.gather_inputs(x, matrix))

    def gate_up_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        if refusal(matrix) is None and bias is None:
            return CudaLinear(matrix, dtype=self.dtype, paired=True)
        return self.quant_linear(matrix, bias)

    def norm_linear(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, linear: LinearFn
    ) -> torch.Tensor:
        return linear(self._normed(x, weight, eps, linear))

    def add_mlp(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        gate_up: LinearFn,
        down: LinearFn,
    ) -> torch.Tensor:
        normed = self._normed(x, weight, eps, gate_up)
        if isinstance(gate_up, CudaLinear) and gate_up.matrix.paired:
            gated = gate_up.swiglu(normed, _arranged_rows(down, x.shape[0]))
        else:
            gated = self.silu_mul(gate_up(normed))
        return self.add_linear(x, down, gated)

    def _normed(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, linear: LinearFn
    ) -> torch.Tensor:
        """What only this linear will read: arranged, where that spares it a copy."""
        return self._rows.rms_norm(x, weight, eps, _arranged_rows(linear, x.shape[0]))

    def add_linear(self, residual: torch.Tensor, linear: LinearFn, x: torch.Tensor) -> torch.Tensor:
        if isinstance(linear, CudaLinear):
            return linear(x, residual)
        return residual + linear(x)

    def dense_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFn:
        """By cuBLAS, which adds in fp32."""
        weight = weight.to(self.device, self.dtype).contiguous()
        bias = None if bias is None else bias.to(self.device, self.dtype)

        def linear(x: torch.Tensor) -> torch.Tensor:
            with sums_in_fp32():
                return F.linear(x, weight, bias)

        return linear

    def head_linear(self, weight: torch.Tensor, exact: bool = False) -> LinearFn:
        """In 16 bits: cuBLAS reads it at nearly the memory's speed."""
        return self.dense_linear(weight, None)


def _arranged_rows(linear: LinearFn, tokens: int) -> int:
    return linear.arranged_rows(tokens) if isinstance(linear, CudaLinear) else 0


def _check_device() -> None:
    if not torch.cuda.is_available():
        raise ConfigError(
            "torch finds no NVIDIA GPU: install a build of torch with CUDA, or run with "
            "--device cpu."
        )
    binding("driver")
    version()


def _check_capability(device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        major, minor = capability
        raise ConfigError(
            f"The CUDA kernels need compute capability 8.0, this GPU has {major}.{minor}: run "
            "with the 'ref' kernels."
        )
