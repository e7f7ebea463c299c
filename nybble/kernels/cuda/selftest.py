"""At load: every kernel that a model will run against the reference, on random tiles.

A wrong driver, compiler or GPU is found here, in milliseconds, and not in an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from nybble.config import ModelConfig, QuantConfig
from nybble.kernels.backend import LinearFn
from nybble.kernels.cuda.backend import CudaBackend
from nybble.kernels.cuda.linear import CudaLinear
from nybble.kernels.cuda.packing import SHORT_GROUPS, TILE, pack, padded_rows, refusal
from nybble.kernels.cuda.plans import Gpu, Layout, Plan, plan_for
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.cuda.selftest_ops import Shape, check, check_reader, compare, normal
from nybble.kernels.matrix import QuantMatrix
from nybble.kernels.ref import RefBackend

# Into every row of the plans' tables.
_TOKENS = (*range(1, 65), *range(80, 1100, 16), *range(1152, 4200, 64))
_WIDTH = 1024  # of the matrices that stand for the model's
_EPS = 1e-6


class Variant(NamedTuple):
    """A matrix kernel; plan None: dequantised weights and cuBLAS."""

    plan: Plan | None
    paired: bool


def check_model(backend: CudaBackend, config: ModelConfig, kv_kind: str) -> None:
    """Raises ConfigError, naming the kernel, where a result is off."""
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    shape = Shape(*heads, config.hidden_size, kv_kind)
    check(backend, shape)
    if config.quant is not None:
        _check_products(backend, config, config.quant, shape)


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


def _check_products(
    backend: CudaBackend, config: ModelConfig, quant: QuantConfig, shape: Shape
) -> None:
    """Alone, then behind what leaves its result in the order that they read."""
    random = _seeded(backend)
    wide, square = _matrices(backend, quant, random)
    if refusal(square) is not None:
        check_linear(backend, square)
        return
    packed = {True: pack(wide, paired=True), False: pack(square)}
    some = CudaLinear(packed[False], dtype=backend.dtype)
    tokens = variants(config, quant, some.layout.exact_scales, some.gpu)
    linears = {
        variant: CudaLinear(packed[variant.paired], dtype=backend.dtype, plan=variant.plan)
        for variant in tokens
    }
    _load(linears)
    reference = RefBackend(backend.device, backend.dtype)
    gate_up, product = (reference.quant_linear(matrix, None) for matrix in (wide, square))
    weight = normal(backend, random, square.in_features)
    *_, down = layouts(config, quant, some.layout.exact_scales)
    for variant, linear in linears.items():
        x = normal(backend, random, tokens[variant], square.in_features)
        name = f"matrix ({quant.bits} bits, {len(x)} tokens)"
        if variant.paired:
            reader = linears[Variant(plan_for(len(x), down, some.gpu), paired=False)]
            compare(name, linear(x), reference.silu_mul(gate_up(x)))
            _check_mlp(backend, x, weight, (linear, reader), (gate_up, product))
        else:
            compare(name, linear(x), product(x))
            if linear.arranged_rows(len(x)):
                _check_behind_norm(backend, x, weight, linear, product)
                check_reader(backend, shape, linear, product, square.in_features)


def _check_mlp(
    backend: CudaBackend,
    x: torch.Tensor,
    weight: torch.Tensor,
    linears: tuple[LinearFn, LinearFn],
    expected: tuple[LinearFn, LinearFn],
) -> None:
    """linears: gate and up, then down; expected: the reference's."""
    reference = RefBackend(backend.device, backend.dtype)
    want = reference.add_mlp(x.clone(), weight, _EPS, *expected)
    got = backend.add_mlp(x, weight, _EPS, *linears)
    compare(f"MLP ({len(x)} tokens)", got, want)


def _check_behind_norm(
    backend: CudaBackend,
    x: torch.Tensor,
    weight: torch.Tensor,
    linear: LinearFn,
    expected: LinearFn,
) -> None:
    reference = RefBackend(backend.device, backend.dtype)
    want = reference.norm_linear(x, weight, _EPS, expected)
    got = backend.norm_linear(x, weight, _EPS, linear)
    compare(f"rms_norm before a matrix ({len(x)} tokens)", got, want)


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


def _matrices(
    backend: CudaBackend, quant: QuantConfig, random: torch.Generator
) -> Iterator[QuantMatrix]:
    """Small ones on the grid of the model's: of gate and up, and one that reads their result."""
    width = -(-max(_WIDTH, quant.group_size) // _WIDTH) * _WIDTH
    for outputs in (2 * width, width):
        yield random_matrix(
            width,
            outputs,
            bits=quant.bits,
            group_size=quant.group_size,
            symmetric=quant.sym,
            scale=0.16 / 2**quant.bits,  # results of an MLP are of the size of its inputs
            scale_dtype=backend.dtype,
            random=random,
        )


def _seeded(backend: CudaBackend) -> torch.Generator:
    return torch.Generator(backend.device).manual_seed(0)
