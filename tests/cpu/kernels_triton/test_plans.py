"""Which kernel serves which batch, and that its shape fits the matrix."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nybble.kernels.cuda.plans import (
    ALL_PLANS,
    Gpu,
    HopperPlan,
    Layout,
    MmaPlan,
    fitted,
    group_define,
    inverse,
    plan_for,
)

H100 = Gpu(132, hopper=True)
A100 = Gpu(108, hopper=False)
SHARED_LIMIT = 227 * 1024
SHAPES = {"qkv": (8192, 24576), "attn_out": (8192, 8192), "down": (24576, 8192)}


def layout(rows: int, outputs: int, bits: int = 4, size: int = 128, exact: bool = True) -> Layout:
    return Layout(bits, rows, -(-outputs // 16), -(-rows // size), size, exact)


def test_small_batches_use_mma_and_large_ones_cublas():
    for shape in SHAPES.values():
        assert plan_for(1, layout(*shape), H100) == MmaPlan(columns=1)
        assert isinstance(plan_for(64, layout(*shape), H100), HopperPlan)
        assert isinstance(plan_for(64, layout(*shape), A100), MmaPlan)
        assert plan_for(4096, layout(*shape), H100) is None


def test_scales_that_the_activations_cannot_hold_never_meet_the_hopper_kernel():
    for tokens in range(1, 1200, 50):
        plan = plan_for(tokens, layout(8192, 8192, exact=False), H100)
        assert not isinstance(plan, HopperPlan)


@given(
    st.sampled_from(ALL_PLANS),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128, 192, 256]),
    st.integers(1, 64),
)
def test_chunks_fit_the_matrix(plan, bits, size, pieces):
    rows = pieces * 64 if size <= 64 else -(-pieces * 64 // size) * size
    shape = layout(rows, 64, bits, size)
    fit = fitted(plan, shape)
    chunk, group = fit.pieces * 64, group_define(shape, fit.pieces)
    assert rows % chunk == 0
    if group:
        assert group == size
        assert chunk % group == 0
    else:
        assert shape.groups == 1 or size % chunk == 0
    if isinstance(fit, HopperPlan):
        assert fit.depth * fit.pieces % 2 == 0
        assert fit.buffers > 2
        assert fit.shared_bytes * fit.min_blocks <= SHARED_LIMIT


@given(st.integers(1, 4096), st.integers(0, 2**19))
def test_division_by_the_inverse_is_exact(divisor, n):
    assert (n * inverse(divisor)) >> 31 == n // divisor


def test_grids_cover_the_product():
    for plan in ALL_PLANS:
        for tokens in (1, 7, 64, 129):
            across, down = plan.grid(tokens, 100)
            if isinstance(plan, HopperPlan):
                assert across // plan.split * plan.tokens >= tokens
                assert down * plan.warpgroups * 4 >= 100
            else:
                assert across * plan.columns * 8 >= tokens
                assert down * plan.bands * plan.tiles >= 100
