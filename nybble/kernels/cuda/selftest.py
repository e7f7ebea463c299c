"""At load: every kernel that a model will run against the reference, on random tiles.

A wrong driver, compiler or GPU is found here, in milliseconds, and not in an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from nybble.config import ModelConfig, QuantConfig
from nybble.kernels.cuda.backend import CudaBackend
from nybble.kernels.cuda.linear import CudaLinear
from nybble.kernels.cuda.packing import SHORT_GROUPS, TILE, pack, padded_rows, refusal
from nybble.kernels.cuda.plans import Gpu, Layout, Plan, plan_for
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.cuda.selftest_ops import Shape, check, compare, normal
from nybble.kernels.matrix import QuantMatrix
from nybble.kernels.ref import RefBackend

# Into every row of the plans' tables.
_TOKENS = (*range(1, 65), *range(80, 1100, 16), *range(1152, 4200, 64))
_INPUTS, _OUTPUTS = 1024, 256  # of the matrix that stands for the model's


class Variant(NamedTuple):
    """A matrix kernel; plan None: dequantised weights and cuBLAS."""

    plan: Plan | None
    paired: bool


def check_model(backend: CudaBackend, config: ModelConfig, kv_kind: str) -> None:
    """Raises ConfigError, naming the kernel, where a result is off."""
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    check(backend, Shape(*heads, config.hidden_size, kv_kind))
    if config.quant is not None:
        _check_products(backend, config, config.quant)


def check_linear(backend: CudaBackend, matrix: QuantMatrix, tokens: int = 3) -> None:
    """Raises ConfigError where what the backend makes of this matrix is off."""
    x = normal(backend, _seeded(backend), tokens, matrix.in_features)
    want = RefBackend(backend.device, backend.dtype).quant_linear(matrix, None)(x)
    compare(f"matrix ({matrix.bits} bits)", backend.quant_linear(matrix, None)(x), want)


def variants(config: ModelConfig, quant: QuantConfig, exact: bool, gpu: Gpu) -> dict[Variant, int]:
    """The kernels of a model's products, each with a number of tokens that takes it.

    exact: see Layout.exact_scales.
    """
    found: dict[Variant, int] = {}
    for layout in layouts(config, quant, exact):
        for tokens in _TOKENS:
            found.setdefault(Variant(plan_for(tokens, layout, gpu), layout.paired), tokens)
    return found


def layouts(config: ModelConfig, quant: QuantConfig, exact: bool) -> Iterator[Layout]:
    """Of the four matrices of a block, as they will be packed."""
    hidden, width = config.hidden_size, config.intermediate_size
    shapes = (
        (hidden, config.q_size + 2 * config.kv_size, False),
        (config.q_size, hidden, False),
        (hidden, 2 * width, True),
        (width, hidden, False),
    )
    for inputs, outputs, paired in shapes:
        size = quant.group_size if 0 < quant.group_size < inputs else 0
        rows = padded_rows(inputs, size)
        groups = -(-(rows if size in SHORT_GROUPS else inputs) // size) if size else 1
        half = TILE // 2
        tiles = -(-(outputs // 2) // half) if paired else -(-outputs // TILE)
        yield Layout(quant.bits, rows, tiles, groups, size or rows, exact, paired)


def _check_products(backend: CudaBackend, config: ModelConfig, quant: QuantConfig) -> None:
    random = _seeded(backend)
    matrix = _small_matrix(backend, quant, random)
    if refusal(matrix) is not None:
        check_linear(backend, matrix)
        return
    packed = {paired: pack(matrix, paired=paired) for paired in (False, True)}
    some = CudaLinear(packed[False], dtype=backend.dtype)
    tokens = variants(config, quant, some.layout.exact_scales, some.gpu)
    linears = {
        variant: CudaLinear(packed[variant.paired], dtype=backend.dtype, plan=variant.plan)
        for variant in tokens
    }
    _load(linears)
    reference = RefBackend(backend.device, backend.dtype)
    product = reference.quant_linear(matrix, None)
    for variant, linear in linears.items():
        x = normal(backend, random, tokens[variant], matrix.in_features)
        want = reference.silu_mul(product(x)) if variant.paired else product(x)
        compare(f"matrix ({matrix.bits} bits, {len(x)} tokens)", linear(x), want)


def _load(linears: dict[Variant, CudaLinear]) -> None:
    """Side by side: compiling one takes a core some tenths of a second."""
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(linear.load, variant.plan)
            for variant, linear in linears.items()
            if variant.plan is not None
        ]
        for one in started:
            one.result()


def _small_matrix(backend: CudaBackend, quant: QuantConfig, random: torch.Generator) -> QuantMatrix:
    """With the grid of the model's."""
    return random_matrix(
        max(_INPUTS, quant.group_size),
        _OUTPUTS,
        bits=quant.bits,
        group_size=quant.group_size,
        symmetric=quant.sym,
        scale_dtype=backend.dtype,
        random=random,
    )


def _seeded(backend: CudaBackend) -> torch.Generator:
    return torch.Generator(backend.device).manual_seed(0)
