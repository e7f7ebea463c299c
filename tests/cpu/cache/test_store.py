from __future__ import annotations

import pytest
import torch

from nybble.cache.store import KVCache
from nybble.errors import CapacityError

CPU = torch.device("cpu")


def test_growing_keeps_the_valid_tokens():
    cache = KVCache(2, 3, 4, torch.float16, CPU)
    cache.reserve(5, limit=10**6)
    cache.keys[1][:, :5] = 1.5
    cache.values[0][:, :5] = 2.5
    cache.length = 5
    cache.reserve(cache.capacity + 1, limit=10**6)
    assert bool((cache.keys[1][:, :5] == 1.5).all())
    assert bool((cache.values[0][:, :5] == 2.5).all())


def test_the_limit_bounds_the_capacity():
    cache = KVCache(1, 1, 2, torch.float32, CPU)
    cache.reserve(7, limit=9)
    assert cache.capacity == 9


def test_truncating_beyond_the_length_is_a_mistake():
    cache = KVCache(1, 1, 2, torch.float32, CPU)
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate(1)


def test_too_large_a_cache_says_what_to_do():
    cache = KVCache(80, 64, 128, torch.float16, CPU)
    with pytest.raises(CapacityError, match="max_context"):
        cache.reserve(10**9, limit=10**9)
