"""At load: every kernel of the attention and of the rows against the reference, on random tiles.

A wrong driver, compiler or GPU is found here, in milliseconds, and not in an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.config import ModelConfig, QuantConfig
from nybble.errors import ConfigError
from nybble.kernels import ref_cache
from nybble.kernels.backend import KV_DTYPES, Batch, KVLayer, scales_shape, stored_width
from nybble.kernels.cuda.backend import CudaBackend
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.matrix import QuantMatrix
from nybble.kernels.ref import RefBackend

_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
_REGIMES = (1, 12, 48, 100, 1100)  # tokens: one for each kind of matrix kernel
_INPUTS, _OUTPUTS = 1024, 256
_LENGTH, _PROMPT = 150, 70  # keys of either sequence; new tokens of the second one


@dataclass(frozen=True)
class Shape:
    """What of a model decides which kernels run."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    kv_kind: str
    page_size: int = 64


def check_model(backend: CudaBackend, config: ModelConfig, kv_kind: str) -> None:
    """All of them for a model, in each regime of its matrices. Raises ConfigError."""
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    check(backend, Shape(*heads, config.hidden_size, kv_kind))
    if config.quant is not None:
        matrix = _random_matrix(backend, config.quant)
        for tokens in _REGIMES:
            check_linear(backend, matrix, tokens)


def check(backend: CudaBackend, shape: Shape) -> None:
    """Raises ConfigError, naming the kernel, where a result is off."""
    reference = RefBackend(backend.device, backend.dtype)
    random = torch.Generator(backend.device).manual_seed(0)
    _check_rows(backend, reference, shape, random)
    _check_attention(backend, reference, shape, random)


def check_linear(backend: CudaBackend, matrix: QuantMatrix, tokens: int = 3) -> None:
    """Raises ConfigError where the kernel of this matrix is off; of the sizes that will run."""
    random = torch.Generator(backend.device).manual_seed(0)
    x = _normal(backend, random, tokens, matrix.in_features)
    want = RefBackend(backend.device, backend.dtype).quant_linear(matrix, None)(x)
    _compare(f"matrix ({matrix.bits} bits)", backend.quant_linear(matrix, None)(x), want)


def _random_matrix(backend: CudaBackend, quant: QuantConfig) -> QuantMatrix:
    """A small one with the grid of the model's."""
    random = torch.Generator(backend.device).manual_seed(0)
    return random_matrix(
        max(_INPUTS, quant.group_size),
        _OUTPUTS,
        bits=quant.bits,
        group_size=quant.group_size,
        symmetric=quant.sym,
        scale_dtype=backend.dtype,
        random=random,
    )


def _check_rows(
    backend: CudaBackend, reference: RefBackend, shape: Shape, random: torch.Generator
) -> None:
    x = _normal(backend, random, 3, 2 * shape.hidden_size)
    _compare("silu_mul", backend.silu_mul(x), reference.silu_mul(x))
    x, weight = x[:, : shape.hidden_size], x[2, shape.hidden_size :].contiguous()
    got, want = (one.rms_norm(x, weight, 1e-6) for one in (backend, reference))
    _compare("rms_norm", got, want)


def _check_attention(
    backend: CudaBackend, reference: RefBackend, shape: Shape, random: torch.Generator
) -> None:
    """One sequence decodes a token, the other reads a prompt; then both decode."""
    batch, before = _batch(backend.device, shape.page_size)
    cache, expected = (_layer(backend.device, shape, before) for _ in range(2))
    for step in (before, batch):
        tokens = len(step.slots)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        qkv = _normal(backend, random, tokens, heads, shape.head_dim)
        q, k, v = torch.split(qkv, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        angles = torch.rand(
            tokens, shape.head_dim // 2, device=backend.device, generator=random
        ).mul_(6)
        rotary = (angles.cos(), angles.sin())
        turned = backend.rope_store(q, k, v, *rotary, cache, step)
        want = reference.rope_store(q, k, v, *rotary, expected, step)
        _compare("rope_store", turned, want)
        scale = shape.head_dim**-0.5
        got = backend.attention(turned, cache, step, scale)
        want = reference.attention(turned, cache, step, scale)
        _compare(f"attention ({shape.kv_kind} cache)", got, want)
    _compare_caches(cache, expected)


def _batch(device: torch.device, page_size: int) -> tuple[Batch, Batch]:
    """The second step: a token of one sequence, a prompt of the other; the first: all before it."""
    pages = -(-_LENGTH // page_size)
    table = torch.arange(2 * pages, dtype=torch.int32, device=device).view(2, pages).flip(1)

    def step(first: tuple[int, int], last: tuple[int, int]) -> Batch:
        slots, starts = [], [0]
        for s in range(2):
            position = torch.arange(first[s], last[s], device=device)
            page = table[s].long()[position // page_size]
            slots.append((page * page_size + position % page_size).int())
            starts.append(starts[-1] + last[s] - first[s])
        return Batch(
            slots=torch.cat(slots),
            pages=table,
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            lengths=torch.tensor(last, dtype=torch.int32, device=device),
            max_query=max(b - a for a, b in zip(first, last, strict=True)),
            max_length=max(last),
        )

    split = (_LENGTH - 1, _LENGTH - _PROMPT)
    return step(split, (_LENGTH, _LENGTH)), step((0, 0), split)


def _layer(device: torch.device, shape: Shape, batch: Batch) -> KVLayer:
    """An empty cache; what no step writes is NaN, or at least codes that mean nothing."""
    slots = torch.Size((batch.pages.numel(), shape.num_kv_heads, shape.page_size))
    width = stored_width(shape.kv_kind, shape.head_dim)
    dtype = KV_DTYPES[shape.kv_kind]
    fill = torch.nan if dtype.is_floating_point else 77
    scales = scales_shape(shape.kv_kind, slots, shape.head_dim)

    def codes() -> torch.Tensor:
        return torch.full((*slots, width), fill, dtype=dtype, device=device)

    def steps() -> torch.Tensor | None:
        if scales is None:
            return None
        return torch.full(scales, torch.nan, dtype=torch.float16, device=device)

    return KVLayer(shape.kv_kind, codes(), codes(), steps(), steps())


def _compare_caches(got: KVLayer, want: KVLayer) -> None:
    """Codes may differ by one where a value lies between two; 16-bit numbers by a rounding."""
    for name in ("keys", "values"):
        a, b = (ref_cache.unpack(got.kind, getattr(layer, name)) for layer in (got, want))
        if a.is_floating_point():
            written = ~b.isnan()
            _compare(f"rope_store ({name})", a[written], b[written])
        elif bool(((a.int() - b.int()).abs() > 1).any()):
            raise _off(f"rope_store ({name})", "by more than one step")


def _normal(backend: CudaBackend, random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=backend.device, generator=random).to(backend.dtype)


def _compare(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < _TOLERANCE[want.dtype if want.dtype in _TOLERANCE else torch.float16]:
        raise _off(name, f"by {error:.1e} of its size")


def _off(name: str, amount: str) -> ConfigError:
    return ConfigError(
        f"The CUDA kernel {name} gives wrong results on this GPU ({amount}): update the driver "
        "and nvidia-cuda-nvrtc, or run with the 'ref' kernels."
    )
