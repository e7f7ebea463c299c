"""The arithmetic behind `nybble info`, against values worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.cache.sizes import cache_bytes, fitting_tokens, seat_count
from nybble.checkpoint import TensorInfo
from nybble.config import ModelConfig, QuantConfig, RopeConfig
from nybble.errors import CapacityError
from nybble.memory import (
    MemoryPlan,
    Weights,
    fitting_context,
    kv_bytes_per_token,
    plan_memory,
    weigh,
)

QWEN_72B = ModelConfig(
    family="qwen",
    hidden_size=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=64,
    head_dim=128,
    intermediate_size=24576,
    vocab_size=152064,
    norm_eps=1e-6,
    rope=RopeConfig(1e6),
    max_context=32768,
    trained_context=32768,
    qkv_bias=True,
    quant=QuantConfig(bits=4, group_size=128, desc_act=False, sym=True),
)
LINEARS = {
    "attn.c_attn": (8192, 3 * 8192),
    "attn.c_proj": (8192, 8192),
    "mlp.w1": (8192, 24576),
    "mlp.w2": (8192, 24576),
    "mlp.c_proj": (24576, 8192),
}
MATRICES = 80 * sum(inputs * outputs for inputs, outputs in LINEARS.values())


def tensor(dtype: torch.dtype, *shape: int) -> TensorInfo:
    size = torch.Size(shape).numel() * dtype.itemsize
    return TensorInfo(dtype, shape, Path("model.safetensors"), 0, size)


def tensors_of_72b() -> Iterator[tuple[str, TensorInfo]]:
    """What the headers of Qwen-72B-Chat-Int4 say."""
    half = torch.float16
    yield "transformer.wte.weight", tensor(half, 152064, 8192)
    yield "lm_head.weight", tensor(half, 152064, 8192)
    yield "transformer.ln_f.weight", tensor(half, 8192)
    for layer in range(80):
        block = f"transformer.h.{layer}."
        yield f"{block}ln_1.weight", tensor(half, 8192)
        yield f"{block}ln_2.weight", tensor(half, 8192)
        for name, (inputs, outputs) in LINEARS.items():
            yield f"{block}{name}.qweight", tensor(torch.int32, inputs // 8, outputs)
            yield f"{block}{name}.qzeros", tensor(torch.int32, inputs // 128, outputs // 8)
            yield f"{block}{name}.scales", tensor(half, inputs // 128, outputs)
            yield f"{block}{name}.g_idx", tensor(torch.int32, inputs)
            yield f"{block}{name}.bias", tensor(half, outputs)


@pytest.fixture(scope="module")
def headers() -> dict[str, TensorInfo]:
    return dict(tensors_of_72b())


def test_the_72b_on_disk(headers: dict[str, TensorInfo]) -> None:
    disk = weigh(QWEN_72B, headers).disk
    assert MATRICES == 69_793_218_560
    assert disk["quantised weights"] == MATRICES // 2  # 34.9 GB
    assert disk["scales"] == MATRICES // 128 * 2  # 1.09 GB
    assert disk["zero points"] == MATRICES // 128 // 2
    assert disk["embedding and head"] == 2 * 2_491_416_576  # 2 x 2.49 GB
    assert disk["norms"] == 161 * 8192 * 2
    assert disk["group indices"] == 80 * (4 * 8192 + 24576) * 4
    assert disk["biases"] == 80 * (3 + 1 + 3 + 3 + 1) * 8192 * 2


def test_the_parameters_of_the_72b(headers: dict[str, TensorInfo]) -> None:
    """A packed word counts as eight, and the zero biases that the quantiser added not at all."""
    biases, norms = 80 * 3 * 8192, 161 * 8192
    expected = MATRICES + 2 * 152064 * 8192 + biases + norms
    assert weigh(QWEN_72B, headers).parameters == expected == 72_287_920_128


def test_the_72b_in_memory(headers: dict[str, TensorInfo]) -> None:
    weights = weigh(QWEN_72B, headers)
    dense = 2 * 2_491_416_576 + (80 * 3 * 8192 + 161 * 8192) * 2
    assert weights.memory == MATRICES // 2 + MATRICES // 64 + dense
    assert weights.memory < weights.disk_bytes == sum(weights.disk.values())


def test_zero_points_and_act_order_take_memory(headers: dict[str, TensorInfo]) -> None:
    symmetric = weigh(QWEN_72B, headers).memory
    other = QuantConfig(bits=4, group_size=128, desc_act=True, sym=False)
    more = weigh(replace(QWEN_72B, quant=other), headers).memory - symmetric
    assert more == MATRICES // 128 + 80 * (4 * 8192 + 24576) * 8


def test_kv_bytes_of_the_72b() -> None:
    assert kv_bytes_per_token(QWEN_72B, "fp16") == 2_621_440
    assert kv_bytes_per_token(QWEN_72B, "int8") == 1_331_200
    assert kv_bytes_per_token(QWEN_72B, "int6") == 1_003_520
    assert kv_bytes_per_token(QWEN_72B, "int4") == 737_280


@pytest.mark.parametrize(
    ("free", "tokens"),
    [(-1.0, 0), (0, 0), (2_621_439, 0), (2_621_440, 1), (40e9, 15258), (1e12, 32768)],
)
def test_the_context_that_fits(free: float, tokens: int) -> None:
    assert fitting_context(QWEN_72B, "fp16", free) == tokens


def test_a_tied_head_that_is_stored_too_counts_once() -> None:
    config = replace(QWEN_72B, family="llama", tied=True, qkv_bias=False, quant=None)
    headers = {
        "model.embed_tokens.weight": tensor(torch.bfloat16, 152064, 8192),
        "lm_head.weight": tensor(torch.bfloat16, 152064, 8192),
        "model.layers.0.self_attn.rotary_emb.inv_freq": tensor(torch.float32, 64),
    }
    weights = weigh(config, headers)
    assert weights.parameters == 152064 * 8192
    assert weights.memory == 2 * 152064 * 8192
    assert weights.disk["other"] == 256


WEIGHTS_72B = Weights(72_300_000_000, {}, 41_100_000_000)


@pytest.mark.parametrize(
    ("free", "kind", "host_embedding"),
    [
        (130e9, "float16", False),
        (128e9, "float16", True),
        (87e9, "int8", False),
        (84.5e9, "int8", True),
        (76.5e9, "int6", False),
        (75e9, "int6", True),
        (70e9, "int4", False),
        (67.5e9, "int4", True),
    ],
)
def test_the_finest_cache_that_holds_the_context(free, kind, host_embedding) -> None:
    kinds = ("float16", "int8", "int6", "int4")
    plan = plan_memory(QWEN_72B, WEIGHTS_72B, kinds, (32768, 32768), 8192, int(free))
    assert (plan.kv_dtype, plan.host_embedding) == (kind, host_embedding)
    assert plan.total <= free
    assert plan.cache == cache_bytes(QWEN_72B, kind, 32768)


@given(
    st.sampled_from(["float16", "int8", "int6", "int4"]),
    st.floats(0, 200e9),
    st.integers(1, 64),
)
def test_what_is_said_to_fit_fits_and_one_more_would_not(kind, room, running) -> None:
    tokens = fitting_tokens(QWEN_72B, kind, room, running)
    assert tokens == 0 or cache_bytes(QWEN_72B, kind, tokens, running) <= room
    assert cache_bytes(QWEN_72B, kind, tokens + 1, running) > room


def test_sequences_that_run_at_a_time_with_four_bits() -> None:
    assert seat_count("int8", 100, 64) == 64
    assert seat_count("int4", 100, 64) == 1
    assert seat_count("int4", 32768, 64) == 16
    assert seat_count("int4", 10**6, 64) == 64
    assert cache_bytes(QWEN_72B, "int4", 32768, 64) == 32768 * 737_280 + 16 * 64 * 2_621_440


def test_a_cache_takes_the_room_that_it_has_use_for() -> None:
    plan = plan_memory(QWEN_72B, WEIGHTS_72B, ("int8",), (1000, 10**6), 2048, int(84e9))
    assert 0.94 * 84e9 < plan.total <= 0.95 * 84e9
    assert plan.cache_tokens > 25_000
    enough = plan_memory(QWEN_72B, WEIGHTS_72B, ("int8",), (1000, 2000), 2048, int(84e9))
    assert enough.cache_tokens == 2000


def test_what_does_not_fit_says_what_would() -> None:
    def plan(kinds: tuple[str, ...], free: float) -> object:
        return plan_memory(QWEN_72B, WEIGHTS_72B, kinds, (32768, 32768), 8192, int(free))

    with pytest.raises(CapacityError, match=r"85\.9 GB.* 80\.0 GB.*: use .*int4 or --max-context"):
        plan(("float16",), 80e9)
    with pytest.raises(CapacityError, match=r"use --max-context \d+\.$"):
        plan(("float16", "int4"), 50e9)
    with pytest.raises(CapacityError, match="a GPU with more memory"):
        plan(("float16", "int4"), 24e9)


@given(st.floats(40e9, 75e9), st.integers(1, 64), st.integers(100, 32768))
def test_a_refusal_needs_more_than_there_is_and_its_advice_fits(free, running, context) -> None:
    """Also where it is the open pages of many sequences that do not fit."""

    def plan(tokens: int) -> MemoryPlan:
        sizes = (tokens, tokens)
        return plan_memory(QWEN_72B, WEIGHTS_72B, ("int4",), sizes, 8192, int(free), running)

    try:
        assert plan(context).total <= free
    except CapacityError as error:
        needed = re.search(r"needs [\d.]+ GB \(.*: ([\d.]+) of ([\d.]+) GB", str(error))
        assert float(needed[1]) >= float(needed[2])
        advised = re.search(r"--max-context (\d+)", str(error))
        if advised:
            assert int(advised[1]) < context
            assert plan(int(advised[1])).total <= free
