"""What a cached token weighs. Pure arithmetic, so that `nybble info` need not load torch."""

from __future__ import annotations

from nybble.config import KV_GROUP, ModelConfig

_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}


def bytes_per_token(config: ModelConfig, kind: str) -> int:
    """Bytes of keys and values that one token adds, over all layers, with their scales."""
    vectors = 2 * config.num_layers * config.num_kv_heads  # a key or value of one head
    groups = {"int8": 1, "int4": 2 * -(-config.head_dim // KV_GROUP)}  # fp16 numbers a vector
    return vectors * (config.head_dim * _BITS[kind] // 8 + 2 * groups.get(kind, 0))
