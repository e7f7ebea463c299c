"""Which kernel serves which batch, and that its shape fits the matrix."""

from __future__ import annotations

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st

from nybble.bench import shapes
from nybble.config import QuantConfig, parse_model_config
from nybble.kernels.cuda.packing import pack, refusal
from nybble.kernels.cuda.plans import (
    ALL_PLANS,
    Gpu,
    HopperPlan,
    Layout,
    MmaPlan,
    fitted,
    group_define,
    inverse,
    layout_of,
    most_shared,
    plan_for,
    shares_of,
)
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.cuda.selftest import layouts, variants

H100 = Gpu(132, hopper=True)
A100 = Gpu(108, hopper=False)
SHARED_LIMIT = 227 * 1024
SHAPES = {"qkv": (8192, 24576), "attn_out": (8192, 8192), "down": (24576, 8192)}


def layout(rows: int, outputs: int, bits: int = 4, size: int = 128, exact: bool = True) -> Layout:
    return Layout(bits, rows, -(-outputs // 16), -(-rows // size), size, exact)


def test_small_batches_use_mma_and_large_ones_wgmma_or_cublas():
    for shape in SHAPES.values():
        assert plan_for(1, layout(*shape), H100) == MmaPlan(columns=1)
        assert isinstance(plan_for(64, layout(*shape), H100), HopperPlan)
        assert isinstance(plan_for(64, layout(*shape), A100), MmaPlan)
        assert isinstance(plan_for(4096, layout(*shape), H100), HopperPlan)
        assert plan_for(4096, layout(*shape), A100) is None


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, 128, 192, 1000, -1])
@pytest.mark.parametrize(("hidden", "width"), [(576, 1536), (1008, 1528)])
def test_the_self_test_knows_how_matrices_are_packed(hidden, width, size, bits):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 8}
    sizes = {"hidden_size": hidden, "intermediate_size": width, **heads}
    config = parse_model_config({**toy.CONFIG, **sizes})
    quant = QuantConfig(bits, size, desc_act=False, sym=True)
    q, kv = hidden // 2, hidden // 4
    matrices = ((hidden, q + 2 * kv), (q, hidden), (hidden, 2 * width), (width, hidden))
    random = torch.Generator().manual_seed(0)
    for number, found in enumerate(layouts(config, quant, exact=True)):
        inputs, outputs = matrices[number]
        group = size if 0 < size < inputs else -1
        matrix = random_matrix(inputs, outputs, bits=bits, group_size=group, random=random)
        if refusal(matrix) is None:
            packed = pack(matrix, paired=number == 2)
            assert found == layout_of(packed, torch.float16)


def test_the_self_test_meets_every_kernel_of_the_72b():
    config = shapes.shape("qwen-72b-int4")
    found = variants(config, config.quant, True, H100)
    for one in layouts(config, config.quant, exact=True):
        for tokens in (*range(1, 2000), *range(2000, 9000, 32)):
            assert (plan_for(tokens, one, H100), one.paired) in found


MMA_PLANS = [plan for plan in ALL_PLANS if isinstance(plan, MmaPlan)]
HOPPER_PLANS = [plan for plan in ALL_PLANS if isinstance(plan, HopperPlan)]


@pytest.mark.parametrize("plan", MMA_PLANS, ids=str)
def test_grids_cover_the_product(plan):
    for tokens in (1, 7, 64, 129):
        across, down = plan.grid(tokens, 100)
        assert across * plan.columns * 8 >= tokens
        assert down * plan.bands * plan.tiles >= 100


@given(
    st.sampled_from(HOPPER_PLANS), st.integers(1, 9000), st.integers(1, 4000), st.integers(1, 100)
)
def test_shares_cover_the_product_and_fit_two_waves(plan, tokens, tiles, chunks):
    shares = shares_of(plan, tokens, tiles, chunks * plan.pieces * 64, H100)
    slots = H100.multiprocessors * plan.min_blocks
    assert shares.whole + shares.shared == plan.blocks(tokens, tiles)
    assert shares.blocks == shares.whole + shares.shared * shares.parts
    if shares.shared:
        assert shares.whole % slots == 0
        assert shares.shared < slots <= most_shared(H100)
        assert shares.shared * shares.parts <= 2 * slots
        assert 1 < shares.parts <= chunks  # each has inputs of its own
