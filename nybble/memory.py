"""How large a model is, on disk and in memory, and how much context fits beside it.

Pure arithmetic on the configuration and the headers of the checkpoint: no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nybble.cache.sizes import bytes_per_token, cache_bytes, fitting_tokens
from nybble.checkpoint import TensorInfo
from nybble.config import KV_OPEN, EngineConfig, ModelConfig
from nybble.errors import CapacityError
from nybble.kernels.cuda.dense import SLAB_BYTES

KV_KINDS = {"fp16": "float16", "int8": "int8", "int6": "int6", "int4": "int4"}
"""The forms of KV cache that are reported, and their kind."""

STEP_TOKENS = {"cuda": 8192, "cpu": 512}
"""What a step takes where nobody says: long ones keep a GPU's tensor cores busy, short ones keep
activations in a CPU's caches."""

_LIBRARIES = 512 << 20
_FILL = 0.95  # of what is free: how much a cache that may grow leaves
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


def weigh(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], float_bytes: int | None = None
) -> Weights:
    """The sizes of a checkpoint from its tensors' names, dtypes and shapes.

    float_bytes: of an unquantised number once loaded, None: as in the file.
    """
    disk: dict[str, int] = {}
    for name, info in tensors.items():
        kind = _kind(config, name, info)
        disk[kind] = disk.get(kind, 0) + info.nbytes
    used = dict(_used(config, tensors))
    return Weights(
        parameters=sum(_parameters(config, name, info) for name, info in used.items()),
        disk=disk,
        memory=sum(_memory(config, name, info, float_bytes) for name, info in used.items()),
    )


def kv_bytes_per_token(config: ModelConfig, kind: str) -> int:
    """Bytes of keys, values and scales that one token adds; kind: a key of KV_KINDS."""
    return bytes_per_token(config, KV_KINDS[kind])


def fitting_context(config: ModelConfig, kind: str, free_bytes: float) -> int:
    """Tokens whose keys and values fit in `free_bytes`, at most what the model advertises.

    With as many sequences at a time as an LLM runs where nobody says.
    """
    tokens = fitting_tokens(config, KV_KINDS[kind], free_bytes, EngineConfig().max_running)
    return min(tokens, config.max_context)


def work_bytes(config: ModelConfig, step_tokens: int, kind: str = "float16") -> int:
    """What a GPU needs beside weights and cache for steps of so many tokens, in 16 bits.

    Activations of the widest moment of a block, dequantised weights, and what libraries and
    decode graphs hold. With open pages a step's keys and values stand in pages of 16 bits, too, and
    queries and results exist twice (kernels/open_pages.py).
    """
    c = config
    attention = 3 * c.q_size + 2 * c.kv_size
    if kind in KV_OPEN:
        attention += 2 * c.q_size + 2 * c.kv_size
    gate_up = min(2 * c.intermediate_size, SLAB_BYTES // (2 * c.hidden_size))
    widest = 2 * c.hidden_size + max(attention, c.intermediate_size + gate_up)
    return 2 * step_tokens * widest + SLAB_BYTES + _LIBRARIES


@dataclass(frozen=True)
class MemoryPlan:
    """How a model will fill a GPU, in bytes; `free` is what there is before it is loaded."""

    weights: int
    work: int
    cache: int
    free: int
    kv_dtype: str
    cache_tokens: int
    host_embedding: bool

    @property
    def total(self) -> int:
        return self.weights + self.work + self.cache

    def __str__(self) -> str:
        return (
            f"weights {self.weights / 1e9:.1f} GB, {self.kv_dtype} cache of "
            f"{self.cache_tokens:,} tokens {self.cache / 1e9:.1f} GB, work "
            f"{self.work / 1e9:.1f} GB: {self.total / 1e9:.1f} of {self.free / 1e9:.1f} GB"
            + (", token embeddings in main memory" if self.host_embedding else "")
        )


def plan_memory(
    config: ModelConfig,
    weights: Weights,
    kinds: Sequence[str],
    cache_tokens: tuple[int, int],
    step_tokens: int,
    free: int,
    running: int = 1,
) -> MemoryPlan:
    """The plan with the first of `kinds` that fits; the embedding leaves the GPU if that helps.

    cache_tokens: the least that the cache must hold, and the most that it has use for where
    there is room, for at most `running` sequences at a time. Raises CapacityError, with what would
    fit, where nothing does.
    """
    least, most = cache_tokens
    table = 0 if config.tied else 2 * config.vocab_size * config.hidden_size
    for kind in kinds:
        work = work_bytes(config, step_tokens, kind)
        for moved in (0, table) if table else (0,):
            held = weights.memory - moved
            if held + work + cache_bytes(config, kind, least, running) <= free:
                room = _FILL * free - held - work
                tokens = max(least, min(most, fitting_tokens(config, kind, room, running)))
                cache = cache_bytes(config, kind, tokens, running)
                return MemoryPlan(held, work, cache, free, kind, tokens, moved > 0)
    last, held = kinds[-1], weights.memory - table
    work, cache = work_bytes(config, step_tokens, last), cache_bytes(config, last, least, running)
    plan = MemoryPlan(held, work, cache, free, last, least, table > 0)
    raise CapacityError(_shortage(config, plan, running))


def _shortage(config: ModelConfig, plan: MemoryPlan, running: int) -> str:
    left = plan.free - plan.weights - plan.work
    fits = fitting_tokens(config, plan.kv_dtype, left, running)
    needs = f"This model needs {plan.total / 1e9:.1f} GB ({plan}): "
    if fits < 1:
        return needs + "use a GPU with more memory, a smaller model, or --device cpu."
    smaller = "" if plan.kv_dtype == "int4" else "--kv-dtype int4 or "
    return needs + f"use {smaller}--max-context {fits}."


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


def _memory(config: ModelConfig, name: str, info: TensorInfo, float_bytes: int | None) -> int:
    """Symmetric matrices keep no zero points, others a byte each; only act-order keeps an index."""
    suffix, quant = name.rpartition(".")[2], config.quant
    if suffix == "qzeros" and quant:
        return 0 if quant.sym else math.prod(info.shape) * (32 // quant.bits)
    if suffix == "g_idx":
        return math.prod(info.shape) * 8 if quant and quant.desc_act else 0
    if float_bytes is None or suffix in ("qweight", "scales"):
        return info.nbytes
    return math.prod(info.shape) * float_bytes
