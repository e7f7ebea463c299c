"""The byte layout of GPTQ checkpoints, both ways: files <-> QuantMatrix.

The layout is AutoGPTQ's (docs/gptq-format.md). Dialects: "gptq" (v1) stores zero - 1, "gptq_v2"
stores zero; symmetric files tell by their values which they are, whatever their label says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.config import QuantConfig
from nybble.errors import CheckpointError
from nybble.kernels import ref
from nybble.kernels.matrix import QuantMatrix

# The kernels work on blocks of inputs; a padded act-order group is a multiple of this.
_GROUP_ALIGN = 32


@dataclass(frozen=True)
class GptqTensors:
    """The tensors of one quantised linear, as stored. `where` names it in errors."""

    where: str
    qweight: torch.Tensor  # int32 (K / pack, N)
    qzeros: torch.Tensor  # int32 (groups, N / pack)
    scales: torch.Tensor  # float (groups, N)
    g_idx: torch.Tensor | None = None  # int32 (K,)

    def error(self, tensor: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}.{tensor} {found}: the file does not match config.json's "
            "quantization_config; download the model again or report its source."
        )


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 (rows, cols) -> uint8 (rows * pack, cols): codes packed along the first dimension."""
    return ref.unpack(words, bits, len(words) * (32 // bits)).to(torch.uint8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (rows, cols) -> int32 (ceil(rows / pack), cols), the reverse of `unpack`."""
    per_word = 32 // bits
    short = -codes.shape[0] % per_word
    padded = torch.nn.functional.pad(codes, (0, 0, 0, short)).to(torch.int64)
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=codes.device)
    words = (padded.reshape(-1, per_word, codes.shape[1]) << shifts[:, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def read_matrix(tensors: GptqTensors, config: QuantConfig) -> QuantMatrix:
    """QuantMatrix of one linear: shapes checked, zero points decoded, act-order sorted away."""
    bits, per_word = config.bits, 32 // config.bits
    if tensors.qweight.ndim != 2 or tensors.qweight.dtype != torch.int32:
        raise tensors.error("qweight", _describe(tensors.qweight))
    rows, outputs = tensors.qweight.shape[0] * per_word, tensors.qweight.shape[1]
    group_size = rows if config.group_size == -1 else min(config.group_size, rows)
    groups = -(-rows // group_size)
    if tensors.scales.shape != (groups, outputs) or not tensors.scales.is_floating_point():
        raise tensors.error("scales", _describe(tensors.scales))
    if not bool(torch.isfinite(tensors.scales).all()):
        raise tensors.error("scales", "holds values that are not finite")
    matrix = QuantMatrix(
        bits=bits,
        group_size=group_size,
        in_features=rows,
        words=tensors.qweight,
        scales=tensors.scales,
        zeros=_decode_zeros(tensors, config),
    )
    g_idx = tensors.g_idx
    if g_idx is None or _is_trivial(g_idx, rows, group_size):
        return matrix
    return _sort_groups(matrix, _checked_g_idx(tensors, rows, groups, group_size))


def _decode_zeros(tensors: GptqTensors, config: QuantConfig) -> torch.Tensor | None:
    groups, outputs = tensors.scales.shape
    per_word = 32 // config.bits
    expected = (groups, -(-outputs // per_word))
    if tensors.qzeros.shape != expected or tensors.qzeros.dtype != torch.int32:
        raise tensors.error("qzeros", _describe(tensors.qzeros))
    stored = unpack(tensors.qzeros.t(), config.bits).t()[:, :outputs]
    middle = 2 ** (config.bits - 1)
    if config.sym and _uniform(stored) in (middle - 1, middle):
        return None
    offset = 0 if config.checkpoint_format == "gptq_v2" else 1
    zeros = (stored + offset) & (2**config.bits - 1)
    return None if _uniform(zeros) == middle else zeros.contiguous()


def _uniform(values: torch.Tensor) -> int | None:
    """The value that every element has, or None."""
    first = int(values.flatten()[0])
    return first if bool((values == first).all()) else None


def _is_trivial(g_idx: torch.Tensor, rows: int, group_size: int) -> bool:
    trivial = torch.arange(rows, device=g_idx.device) // group_size
    return g_idx.shape == trivial.shape and bool((g_idx == trivial).all())


def _checked_g_idx(tensors: GptqTensors, rows: int, groups: int, size: int) -> torch.Tensor:
    g_idx = tensors.g_idx
    if g_idx is None or g_idx.shape != (rows,) or g_idx.is_floating_point():
        raise tensors.error("g_idx", "missing" if g_idx is None else _describe(g_idx))
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise tensors.error("g_idx", f"names groups outside 0 to {groups - 1}")
    g_idx = g_idx.long()
    # Every group is padded to the longest: with one of all inputs, a small file would fill memory.
    longest = int(torch.bincount(g_idx).max())
    if longest > 2 * max(size, _GROUP_ALIGN):
        raise tensors.error("g_idx", f"puts {longest} inputs into one group of {size}")
    return g_idx


def _sort_groups(matrix: QuantMatrix, g_idx: torch.Tensor) -> QuantMatrix:
    """Put the inputs of each group side by side, so that kernels never see a g_idx."""
    order = torch.argsort(g_idx, stable=True)
    counts = torch.bincount(g_idx, minlength=matrix.scales.shape[0])
    starts = torch.cumsum(counts, 0) - counts
    size = matrix.group_size
    full, last = bool((counts[:-1] == size).all()), int(counts[-1])
    if not full or last > size:
        size = -(-int(counts.max()) // _GROUP_ALIGN) * _GROUP_ALIGN
        last = size
    # Row r of the sorted matrix belongs to group r // size; the rows a short group lacks read
    # the input `in_features`, which is defined as 0.
    total = size * (len(counts) - 1) + last
    row = torch.arange(total, device=g_idx.device)
    group, offset = row // size, row % size
    real = offset < counts[group]
    source = torch.where(real, starts[group] + offset, 0)
    perm = torch.where(real, order[source], matrix.in_features)
    codes = unpack(matrix.words, matrix.bits)[order[source]]
    return QuantMatrix(
        bits=matrix.bits,
        group_size=size,
        in_features=matrix.in_features,
        words=pack(codes, matrix.bits),
        scales=matrix.scales,
        zeros=matrix.zeros,
        perm=perm,
    )


def concat(parts: list[QuantMatrix]) -> QuantMatrix | None:
    """Parts that read the same inputs as one matrix with all their outputs; None if they differ."""
    first = parts[0]
    if len(parts) == 1:
        return first
    form = (first.bits, first.group_size, first.in_features, first.scales.dtype)
    for part in parts[1:]:
        if (part.bits, part.group_size, part.in_features, part.scales.dtype) != form:
            return None
        if not _same(first.perm, part.perm):
            return None
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([_zeros_of(part) for part in parts], 1)
    return QuantMatrix(
        bits=first.bits,
        group_size=first.group_size,
        in_features=first.in_features,
        words=torch.cat([part.words for part in parts], 1),
        scales=torch.cat([part.scales for part in parts], 1),
        zeros=zeros,
        perm=first.perm,
    )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _zeros_of(matrix: QuantMatrix) -> torch.Tensor:
    if matrix.zeros is not None:
        return matrix.zeros
    middle = 2 ** (matrix.bits - 1)
    return torch.full(matrix.scales.shape, middle, dtype=torch.uint8, device=matrix.device)


def write_tensors(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor,
    config: QuantConfig,
) -> dict[str, torch.Tensor]:
    """The tensors of one linear as a checkpoint stores them.

    codes uint8 (K, N), scales (groups, N), zeros uint8 (groups, N), g_idx (K,). Stored as
    `config.checkpoint_format` says; a v1 zero of 0 wraps to the largest code, as readers expect.
    """
    offset = 0 if config.checkpoint_format == "gptq_v2" else 1
    stored = (zeros.to(torch.int16) - offset).to(torch.uint8) & (2**config.bits - 1)
    return {
        "qweight": pack(codes, config.bits),
        "qzeros": pack(stored.t().contiguous(), config.bits).t().contiguous(),
        "scales": scales.to(torch.float16),
        "g_idx": g_idx.to(torch.int32),
    }


def _describe(tensor: torch.Tensor) -> str:
    return f"has shape {tuple(tensor.shape)} and type {tensor.dtype}"
