"""Kernels that torch brings along for the CPU: what runs where no C compiler is found."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nybble.kernels.backend import Choice, LinearFn
from nybble.kernels.matrix import QuantMatrix
from nybble.kernels.ref import RefBackend, dequantize, gather_inputs, unpack
from nybble.kernels.table import choose_kernel

DECODE_ROWS = 16  # above, dequantising once and multiplying in bf16 is faster


class TorchBackend(RefBackend):
    """bf16 products with fp32 in and out; everything else as in the reference."""

    name = "torch"

    def choose(self, matrix: QuantMatrix) -> Choice:
        return choose_kernel(self.name, matrix)

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        tokens, length = q.shape[0], keys.shape[1]
        if 1 < tokens < length:  # torch aligns its causal mask to the first key
            slots = torch.arange(length)
            mask = slots[None, :] <= slots[length - tokens :, None]
        else:
            mask = None
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None and tokens > 1,
            scale=scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def quant_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        few = None
        if self.choose(matrix).kernel == "torch-int4pack":
            few = _int4pack_linear(matrix)

        def linear(x: torch.Tensor) -> torch.Tensor:
            gathered = gather_inputs(x, matrix).to(torch.bfloat16)
            if few is not None and gathered.shape[0] <= DECODE_ROWS:
                out = few(gathered)
            else:
                out = gathered @ dequantize(matrix).to(torch.bfloat16)
            return out.to(x.dtype) if bias is None else (out + bias.float()).to(x.dtype)

        return linear

    def dense_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFn:
        wide_bias = None if bias is None else bias.float()

        def linear(x: torch.Tensor) -> torch.Tensor:
            out = F.linear(x.to(weight.dtype), weight).float()
            return (out if wide_bias is None else out + wide_bias).to(x.dtype)

        return linear


def _int4pack_linear(matrix: QuantMatrix) -> LinearFn:
    """torch's kernel computes W = (q - 8) * scale + offset: a zero z is offset (8 - z) * scale."""
    codes = unpack(matrix.words, 4, matrix.rows).t().contiguous()  # (N, K)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = matrix.scales.float()
    zeros = torch.full_like(scales, 8.0) if matrix.zeros is None else matrix.zeros.float()
    table = torch.stack((scales, (8.0 - zeros) * scales), dim=-1).to(torch.bfloat16)

    def linear(x: torch.Tensor) -> torch.Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        product: torch.Tensor = multiply(x, packed, matrix.group_size, table)
        return product

    return linear
