"""The truth in plain torch: every fast kernel is tested against what stands here."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nybble.kernels import ref_cache
from nybble.kernels.backend import Batch, Choice, KVLayer, LinearFn, Partial
from nybble.kernels.matrix import QuantMatrix

# Weights rounded at a time: what is made of them on the way stays in the processor's cache.
_PIECE = 2**19
# Scores of attention held at a time, so that memory does not grow with the square of a prompt.
_SCORES = 2**26


def unpack(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """GPTQ words int32 (ceil(rows / pack), N) -> codes int32 (rows, N)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes: torch.Tensor = (words.unsqueeze(1) >> shifts.view(1, -1, 1)) & (2**bits - 1)
    return codes.flatten(0, 1)[:rows]  # from (words, pack, N)


def dequantize(matrix: QuantMatrix) -> torch.Tensor:
    """W as stored, fp32 (rows, N): row k is that of input perm[k], or k without perm."""
    rows, bits = matrix.rows, matrix.bits
    group = torch.arange(rows, device=matrix.device) // matrix.group_size
    codes = unpack(matrix.words, bits, rows).float()
    if matrix.zeros is None:
        codes -= 2 ** (bits - 1)
    else:
        codes -= matrix.zeros.float()[group]
    return codes.mul_(matrix.scales.float()[group])


def gather_inputs(x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
    """x (..., in_features) -> (..., rows) in the order of the stored rows; padding rows see 0."""
    if matrix.perm is None:
        return x
    return F.pad(x, (0, 1)).index_select(-1, matrix.perm)


def quantize_dense(weight: torch.Tensor, bits: int = 8, group_size: int = 32) -> QuantMatrix:
    """Round weight (N, K) to nearest, symmetric: steps of largest magnitude / 127 (4 bits: 7)."""
    rows = max(1, _PIECE // weight.shape[1])
    pieces = [_quantize_rows(piece, bits, group_size) for piece in torch.split(weight, rows)]
    words, scales = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    half = scales.to(torch.float16)
    if torch.equal(half.float(), scales):
        scales = half
    return QuantMatrix(bits, group_size, weight.shape[1], words, scales)


def _quantize_rows(
    weight: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    zero, groups = 2 ** (bits - 1), -(-k // group_size)
    padded = F.pad(weight.float(), (0, groups * group_size - k)).view(n, groups, group_size)
    scales = padded.abs().amax(2, keepdim=True) / (zero - 1)
    half = scales.to(torch.float16).float()
    # A scale below fp16's normal range would spoil its row: those stay fp32, and then all do.
    scales = torch.where((half - scales).abs() <= scales * 2**-11, half, scales)
    steps = torch.where(scales > 0, scales, 1.0)
    codes = (padded / steps).round_().clamp_(1 - zero, zero - 1).add_(zero).flatten(1)[:, :k]
    codes = F.pad(codes.to(torch.int32), (0, -k % (32 // bits)), value=zero)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=weight.device)
    words = (codes.view(n, -1, 32 // bits) << shifts).sum(2, dtype=torch.int32)
    return words.t(), scales.squeeze(2).t()


class RefBackend:
    """Every operation in fp32 and in the order of its formula; slow, on any device.

    dtype is that of activations, which every operation returns as it got them.
    """

    name = "ref"

    def __init__(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype

    def choose(self, matrix: QuantMatrix) -> Choice:
        return Choice("ref")

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table).to(self.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

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
        turned, key = rotate(q, cos, sin), rotate(k, cos, sin)
        if layer.quantized:
            turned, key = ref_cache.hadamard(turned), ref_cache.hadamard(key)
        ref_cache.store(layer.keys, layer.key_scales, layer.kind, batch.slots, key)
        ref_cache.store(layer.values, layer.value_scales, layer.kind, batch.slots, v.float())
        return turned.to(q.dtype)

    def attention(
        self,
        q: torch.Tensor,
        layer: KVLayer,
        batch: Batch,
        scale: float,
        reader: LinearFn | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(q)  # (tokens, heads, head_dim)
        for rows, _, keys, values in ref_cache.sequences(layer, batch):
            out[rows] = self.attend(q[rows].float(), keys, values, scale).to(q.dtype)
        return out.flatten(1)

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """One sequence in fp32: q (tokens, heads, head_dim) is its last tokens, and so the result.

        keys, values (kv_heads, length, head_dim).
        """
        length = keys.shape[1]
        seen = torch.arange(length - len(q), length, device=q.device) + 1
        return _attend(q, keys, values, scale, seen)[0]

    def partial_attention(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, *, closed: bool
    ) -> Partial:
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
        for rows, positions, keys, values in ref_cache.sequences(layer, batch):
            size = layer.page_size
            seen = positions // size * size if closed else positions + 1
            result, lse[rows] = _attend(q[rows].float(), keys, values, scale, seen)
            out[rows] = result.to(q.dtype)
        return out.flatten(1), lse

    def merge_attention(self, first: Partial, second: Partial) -> torch.Tensor:
        (a, a_lse), (b, b_lse) = first, second
        share = torch.sigmoid(b_lse - a_lse).to(a.dtype).unsqueeze(-1)
        shape = (*a_lse.shape, -1)
        return torch.lerp(a.view(shape), b.view(shape), share).flatten(1)

    def quant_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        weight = dequantize(matrix)  # (rows, N)

        def linear(x: torch.Tensor) -> torch.Tensor:
            out = gather_inputs(x, matrix).float() @ weight
            return (out if bias is None else out + bias.float()).to(x.dtype)

        return linear

    def gate_up_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        return self.quant_linear(matrix, bias)

    def norm_linear(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, linear: LinearFn
    ) -> torch.Tensor:
        return linear(self.rms_norm(x, weight, eps))

    def add_mlp(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        gate_up: LinearFn,
        down: LinearFn,
    ) -> torch.Tensor:
        gated = self.silu_mul(self.norm_linear(x, weight, eps, gate_up))
        return self.add_linear(x, down, gated)

    def add_linear(self, residual: torch.Tensor, linear: LinearFn, x: torch.Tensor) -> torch.Tensor:
        return linear(x).add_(residual)

    def dense_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFn:
        def linear(x: torch.Tensor) -> torch.Tensor:
            wide_bias = None if bias is None else bias.float()
            return F.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

        return linear

    def head_linear(self, weight: torch.Tensor, exact: bool = False) -> LinearFn:
        return self.dense_linear(weight, None)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like RefBackend.attend, and ln of each row's sum; seen (tokens,): how many keys it sees."""
    rows = max(1, _SCORES // (q.shape[1] * max(1, keys.shape[1])))
    if len(q) > rows:
        pieces = zip(torch.split(q, rows), torch.split(seen, rows), strict=True)
        parts = [_attend(some, keys, values, scale, count) for some, count in pieces]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    group = q.shape[1] // len(keys)
    k, v = (x.repeat_interleave(group, 0) for x in (keys, values))  # (heads, length, head_dim)
    scores = torch.matmul(q.transpose(0, 1), k.transpose(1, 2)) * scale
    hidden = torch.arange(keys.shape[1], device=q.device) >= seen[:, None]  # (tokens, length)
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)
    weights = torch.where(hidden, 0.0, (scores - lse).exp())
    return torch.matmul(weights, v).transpose(0, 1), lse[..., 0].t()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (tokens, heads, head_dim), cos and sin (tokens, head_dim / 2) -> fp32, half-split form."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
