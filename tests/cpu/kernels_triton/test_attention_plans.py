"""The shapes of the CUDA attention, where they can be checked without a GPU."""

from __future__ import annotations

import pytest

from nybble.kernels.cuda.attention import DECODE_PLANS, HEAD_DIMS, prefill_tile

# Shared memory that a block may have, less what the kernels declare themselves: on compute
# capability 8.6, 8.9 and 12.0; 8.0; 9.0.
LIMITS = (98 * 1024, 162 * 1024, 226 * 1024)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", DECODE_PLANS)
def test_every_cache_fits_every_gpu(kind: str, head_dim: int, limit: int) -> None:
    plan = DECODE_PLANS[kind].fitted(kind, head_dim, limit)
    assert plan.shared_bytes(kind, head_dim) <= limit
    assert prefill_tile(kind, head_dim, limit)[1] <= limit


def test_where_there_is_room_nothing_shrinks() -> None:
    for kind, plan in DECODE_PLANS.items():
        assert plan.fitted(kind, 128, LIMITS[-1]) == plan
        assert prefill_tile(kind, 128, LIMITS[-1])[0] == 64
