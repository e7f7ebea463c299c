"""What a cached token weighs: pure arithmetic on the configuration."""

from __future__ import annotations

from bisect import bisect_right

from nybble.config import KV_BITS, KV_GROUP, KV_OPEN, ModelConfig

PAGE_SIZE = 64
_TOKENS_A_SEAT = 2048


def bytes_per_token(config: ModelConfig, kind: str) -> int:
    """Bytes of keys and values that one token adds, over all layers, with their scales."""
    vectors = 2 * config.num_layers * config.num_kv_heads  # a key or value of one head
    scales = {"int8": 1, "int6": 1, "int4": 2 * -(-config.head_dim // KV_GROUP)}  # a vector, fp16
    return vectors * (config.head_dim * KV_BITS[kind] // 8 + 2 * scales.get(kind, 0))


def seat_count(kind: str, tokens: int, most: int) -> int:
    """How many sequences may run beside one another in a cache of so many tokens, at most `most`.

    Where there are open pages, one weighs as much as some 230 tokens of int4: one for every 2,048.
    """
    return min(most, max(1, tokens // _TOKENS_A_SEAT)) if kind in KV_OPEN else most


def seat_bytes(config: ModelConfig, kind: str) -> int:
    """Bytes of one sequence's open page in 16 bits, over all layers; 0 where it has none."""
    return PAGE_SIZE * bytes_per_token(config, "float16") if kind in KV_OPEN else 0


def cache_bytes(config: ModelConfig, kind: str, tokens: int, running: int = 1) -> int:
    """Bytes of a cache of so many tokens for at most `running` sequences at a time."""
    seats = seat_count(kind, tokens, running)
    return tokens * bytes_per_token(config, kind) + seats * seat_bytes(config, kind)


def fitting_tokens(config: ModelConfig, kind: str, room: float, running: int = 1) -> int:
    """The most tokens whose cache_bytes are within `room`."""
    without_seats = int(room // bytes_per_token(config, kind))

    def needed(tokens: int) -> int:
        return cache_bytes(config, kind, tokens, running)

    return bisect_right(range(1, without_seats + 1), room, key=needed)
