"""For GPUs that the CUDA kernels do not serve: Triton for the matrices, torch for the rest."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F

from nybble.errors import ConfigError
from nybble.kernels import ref
from nybble.kernels.backend import Choice, LinearFn
from nybble.kernels.cuda.precision import sums_in_fp32
from nybble.kernels.matrix import QuantMatrix

_LEAST_CAPABILITY = (7, 5)
_TRITON_TOKENS = 64  # above, dequantising once and multiplying by cuBLAS is faster


class TritonBackend(ref.RefBackend):
    """fp16 or bf16 activations and products, sums in fp32; attention as in the reference."""

    name = "triton"

    @classmethod
    def load(cls, device: torch.device, dtype: torch.dtype) -> TritonBackend:
        """Raises ConfigError where GPU or Triton do not serve."""
        if not torch.cuda.is_available():
            raise ConfigError(
                "torch finds no NVIDIA GPU: install a build of torch with CUDA, or run with "
                "--device cpu."
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            raise ConfigError(
                f"The Triton kernels need compute capability 7.5, this GPU has "
                f"{capability[0]}.{capability[1]}: run with --dtype float32, or on the CPU."
            )
        _kernels()
        # Before 8.0 the tensor cores know no bf16.
        return cls(device, dtype if capability >= (8, 0) else torch.float16)

    def choose(self, matrix: QuantMatrix) -> Choice:
        reason = _kernels().refusal(matrix)
        return Choice("triton") if reason is None else Choice("ref", (f"triton: {reason}",))

    def quant_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        kernels = _kernels()
        if kernels.refusal(matrix) is not None:
            return super().quant_linear(matrix, bias)
        few = kernels.TritonLinear(matrix, bias)

        def linear(x: torch.Tensor) -> torch.Tensor:
            if len(x) <= _TRITON_TOKENS:
                result: torch.Tensor = few(x)
                return result
            weight = ref.dequantize(matrix).to(x.dtype).t()
            with sums_in_fp32():
                return F.linear(ref.gather_inputs(x, matrix), weight, bias)

        return linear

    def dense_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFn:
        weight = weight.to(self.device, self.dtype)
        bias = None if bias is None else bias.to(self.device, self.dtype)

        def linear(x: torch.Tensor) -> torch.Tensor:
            with sums_in_fp32():
                return F.linear(x, weight, bias)

        return linear


def _kernels() -> ModuleType:
    try:
        from nybble.kernels.cuda import triton_gemm
    except ImportError as error:
        raise ConfigError(
            f"The Triton kernels need the package {error.name}: run `pip install '.[gpu]'` in "
            "nybble's folder."
        ) from error
    return triton_gemm
