"""What a cached token weighs. Pure arithmetic, so that `nybble info` need not load torch."""

from __future__ import annotations

from nybble.config import KV_BITS, KV_GROUP, ModelConfig


def bytes_per_token(config: ModelConfig, kind: str) -> int:
    """Bytes of keys and values that one token adds, over all layers, with their scales."""
    vectors = 2 * config.num_layers * config.num_kv_heads  # a key or value of one head
    scales = {"int8": 1, "int6": 1, "int4": 2 * -(-config.head_dim // KV_GROUP)}  # a vector, fp16
    return vectors * (config.head_dim * KV_BITS[kind] // 8 + 2 * scales.get(kind, 0))
