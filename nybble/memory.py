"""How large a model is, on disk and in memory, and how much context fits beside it.

Pure arithmetic on the configuration and the headers of the checkpoint: no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nybble.cache.sizes import bytes_per_token
from nybble.checkpoint import TensorInfo
from nybble.config import ModelConfig
from nybble.errors import CapacityError

KV_KINDS = {"fp16": "float16", "int8": "int8", "int6": "int6", "int4": "int4"}
"""The forms of KV cache that are reported, and their kind."""

_QKV = ("c_attn", "q_proj", "k_proj", "v_proj")
_KINDS = {
    "qweight": "quantised weights",
    "scales": "scales",
    "qzeros": "zero points",
    "g_idx": "group indices",
    "bias": "biases",
}
# Buffers that older software saved beside the weights.
_BUFFERS = ("inv_freq", "masked_bias", "logn_tensor")


@dataclass(frozen=True)
class Weights:
    """Sizes of a checkpoint. disk: bytes by kind, all tensors together the file's data.

    parameters counts what the model computes with: K * N for a quantised matrix, and no bias
    that the quantiser only added. memory: bytes once loaded, without what kernels add.
    """

    parameters: int
    disk: Mapping[str, int]
    memory: int

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())


def weigh(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> Weights:
    """The sizes of a checkpoint from its tensors' names, dtypes and shapes."""
    disk: dict[str, int] = {}
    for name, info in tensors.items():
        kind = _kind(config, name, info)
        disk[kind] = disk.get(kind, 0) + info.nbytes
    used = dict(_used(config, tensors))
    return Weights(
        parameters=sum(_parameters(config, name, info) for name, info in used.items()),
        disk=disk,
        memory=sum(_memory(config, name, info) for name, info in used.items()),
    )


def kv_bytes_per_token(config: ModelConfig, kind: str) -> int:
    """Bytes of keys, values and scales that one token adds; kind: a key of KV_KINDS."""
    return bytes_per_token(config, KV_KINDS[kind])


def fitting_context(config: ModelConfig, kind: str, free_bytes: float) -> int:
    """Tokens whose keys and values fit in `free_bytes`, at most what the model advertises."""
    tokens = math.floor(max(free_bytes, 0) / kv_bytes_per_token(config, kind))
    return min(tokens, config.max_context)


def finest_cache(
    config: ModelConfig, kinds: Sequence[str], max_context: int, free_bytes: float
) -> str:
    """The first of `kinds` whose cache holds a full context in `free_bytes`.

    Raises CapacityError, with what would fit, where none does.
    """
    for kind in kinds:
        if max_context * bytes_per_token(config, kind) <= free_bytes:
            return kind
    last = kinds[-1]
    needed = max_context * bytes_per_token(config, last)
    fits = max(math.floor(free_bytes / bytes_per_token(config, last)), 0)
    smaller = "" if last == "int4" else "--kv-dtype int4 or "
    raise CapacityError(
        f"The {last} cache of {max_context:,} tokens needs {needed / 1e9:.1f} GB beside the "
        f"weights, {max(free_bytes, 0) / 1e9:.1f} GB are free: use {smaller}--max-context {fits}."
    )


def _kind(config: ModelConfig, name: str, info: TensorInfo) -> str:
    suffix = name.rpartition(".")[2]
    if suffix in _KINDS:
        return _KINDS[suffix]
    if suffix != "weight":
        return "other"
    if len(info.shape) == 1:
        return "norms"
    vocab = info.shape == (config.vocab_size, config.hidden_size)
    return "embedding and head" if vocab else "unquantised matrices"


def _used(
    config: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors that take part in the computation."""
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        added = (
            suffix == "bias" and f"{module}.qweight" in tensors and not _has_bias(config, module)
        )
        copied = config.tied and name == "lm_head.weight"
        if not (added or copied or suffix in _BUFFERS):
            yield name, info


def _has_bias(config: ModelConfig, module: str) -> bool:
    return config.qkv_bias and module.endswith(_QKV)


def _parameters(config: ModelConfig, name: str, info: TensorInfo) -> int:
    suffix = name.rpartition(".")[2]
    if suffix in ("scales", "qzeros", "g_idx"):
        return 0
    packed = 32 // config.quant.bits if config.quant and suffix == "qweight" else 1
    return math.prod(info.shape) * packed


def _memory(config: ModelConfig, name: str, info: TensorInfo) -> int:
    """Symmetric matrices keep no zero points, others a byte each; only act-order keeps an index."""
    suffix, quant = name.rpartition(".")[2], config.quant
    if suffix == "qzeros" and quant:
        return 0 if quant.sym else math.prod(info.shape) * (32 // quant.bits)
    if suffix == "g_idx":
        return math.prod(info.shape) * 8 if quant and quant.desc_act else 0
    return info.nbytes
