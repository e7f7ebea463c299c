"""At load: every kernel of the attention and of the rows against the reference, on random tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nybble.config import KV_OPEN
from nybble.errors import ConfigError
from nybble.kernels import open_pages, ref_cache
from nybble.kernels.backend import (
    KV_DTYPES,
    Backend,
    Batch,
    KVLayer,
    LinearFn,
    OpenStep,
    scales_shape,
    stored_width,
)
from nybble.kernels.cuda.backend import CudaBackend
from nybble.kernels.ref import RefBackend

_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
Spans = Sequence[tuple[int, int]]  # positions of each sequence's new tokens: first, last + 1
_LENGTH = 150  # keys of either sequence in the end
# Two prompts; then a token of one sequence beside a prompt of the other.
_STEPS: tuple[Spans, ...] = (((0, 149), (0, 80)), ((149, _LENGTH), (80, _LENGTH)))


@dataclass(frozen=True)
class Shape:
    """What of a model decides which kernels run."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    kv_kind: str
    page_size: int = 64


def check(backend: CudaBackend, shape: Shape) -> None:
    """Raises ConfigError, naming the kernel, where a result is off."""
    reference = RefBackend(backend.device, backend.dtype)
    random = torch.Generator(backend.device).manual_seed(0)
    _check_rows(backend, reference, shape, random)
    _check_attention(backend, reference, shape, random)


def check_reader(
    backend: CudaBackend, shape: Shape, linear: LinearFn, want: LinearFn, width: int
) -> None:
    """A prompt's attention as `linear` reads it; want: its reference, of so many inputs."""
    reference = RefBackend(backend.device, backend.dtype)
    random = torch.Generator(backend.device).manual_seed(0)
    heads = width // shape.head_dim
    shape = replace(shape, num_heads=heads, num_kv_heads=heads)
    table = _table(backend.device, 1, -(-_LENGTH // shape.page_size))
    cache = _layer(backend.device, shape, table.numel())
    step = _batch(table, ((0, _LENGTH),), shape.page_size)
    qkv, rotary = _inputs(backend, shape, _LENGTH, random)
    q = backend.rope_store(*qkv, *rotary, cache, step)
    scale = shape.head_dim**-0.5
    got = linear(backend.attention(q, cache, step, scale, linear))
    expected = want(reference.attention(q, cache, step, scale))
    compare(f"attention ({shape.kv_kind} cache, before a matrix)", got, expected)


def _check_rows(
    backend: CudaBackend, reference: RefBackend, shape: Shape, random: torch.Generator
) -> None:
    x = normal(backend, random, 3, 2 * shape.hidden_size)
    compare("silu_mul", backend.silu_mul(x), reference.silu_mul(x))
    x, weight = x[:, : shape.hidden_size], x[2, shape.hidden_size :].contiguous()
    got, want = (one.rms_norm(x, weight, 1e-6) for one in (backend, reference))
    compare("rms_norm", got, want)


def _check_attention(
    backend: CudaBackend, reference: RefBackend, shape: Shape, random: torch.Generator
) -> None:
    """Each step as it is with one kind of pages, then as an int4 cache takes it."""
    table = _table(backend.device, len(_STEPS[0]), -(-_LENGTH // shape.page_size))
    cache, expected = (_layer(backend.device, shape, table.numel()) for _ in range(2))
    scale = shape.head_dim**-0.5
    for spans in _STEPS:
        step = _batch(table, spans, shape.page_size)
        qkv, rotary = _inputs(backend, shape, len(step.slots), random)
        turned = backend.rope_store(*qkv, *rotary, cache, step)
        want = reference.rope_store(*qkv, *rotary, expected, step)
        compare("rope_store", turned, want)
        got = backend.attention(turned, cache, step, scale)
        want = reference.attention(turned, cache, step, scale)
        compare(f"attention ({shape.kv_kind} cache)", got, want)
    _compare_caches(cache, expected)
    if shape.kv_kind in KV_OPEN:
        for spans in _STEPS:
            step = _batch(table, spans, shape.page_size)
            _check_open_pages(backend, reference, shape, cache, step, spans, random)


def _check_open_pages(
    backend: CudaBackend,
    reference: RefBackend,
    shape: Shape,
    cache: KVLayer,
    batch: Batch,
    spans: Spans,
    random: torch.Generator,
) -> None:
    """Seats stand for all pages in 16 bits; what they held before the step is random."""
    size = shape.page_size
    stretches = [
        (max(begin, page) - page, min(end, page + size) - page)
        for begin, end in spans
        for page in range(begin // size * size, end, size)
    ]
    table = _table(backend.device, len(stretches), 1)
    batch = replace(batch, open_step=OpenStep(_batch(table, stretches, size)))
    slots = (2, len(stretches), shape.num_kv_heads, size, shape.head_dim)
    held = normal(backend, random, *slots).half()
    seats = [KVLayer("float16", *held.clone()) for _ in range(2)]
    qkv, rotary = _inputs(backend, shape, len(batch.slots), random)
    kernels: tuple[Backend, Backend] = (backend, reference)
    got, want = (
        open_pages.attention(
            one, qkv, rotary, replace(cache, seats=pages), batch, shape.head_dim**-0.5
        )
        for one, pages in zip(kernels, seats, strict=True)
    )
    compare("attention (int4 cache, open pages)", got, want)
    _compare_caches(*seats)


def _inputs(
    backend: CudaBackend, shape: Shape, tokens: int, random: torch.Generator
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Queries, keys and values as one product gives them; cosines and sines."""
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    qkv = normal(backend, random, tokens, sum(heads), shape.head_dim)
    q, k, v = torch.split(qkv, heads, dim=1)
    size = (tokens, shape.head_dim // 2)
    angles = torch.rand(size, device=backend.device, generator=random).mul_(6)
    return (q, k, v), (angles.cos(), angles.sin())


def _table(device: torch.device, sequences: int, pages: int) -> torch.Tensor:
    """Pages for each sequence, in no plain order."""
    count = sequences * pages
    return torch.arange(count, dtype=torch.int32, device=device).view(sequences, pages).flip(1)


def _batch(table: torch.Tensor, spans: Spans, page_size: int) -> Batch:
    slots, starts = [], [0]
    for pages, (begin, end) in zip(table.long(), spans, strict=True):
        position = torch.arange(begin, end, device=table.device)
        slots.append((pages[position // page_size] * page_size + position % page_size).int())
        starts.append(starts[-1] + end - begin)
    ends = [end for _, end in spans]
    return Batch(
        slots=torch.cat(slots),
        pages=table,
        starts=torch.tensor(starts, dtype=torch.int32, device=table.device),
        lengths=torch.tensor(ends, dtype=torch.int32, device=table.device),
        max_query=max(end - begin for begin, end in spans),
        max_length=max(ends),
    )


def _layer(device: torch.device, shape: Shape, pages: int) -> KVLayer:
    """An empty cache; what no step writes is NaN, or at least codes that mean nothing."""
    slots = torch.Size((pages, shape.num_kv_heads, shape.page_size))
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
            compare(f"rope_store ({name})", a[written], b[written])
        elif bool(((a.int() - b.int()).abs() > 1).any()):
            raise _off(f"rope_store ({name})", "by more than one step")


def normal(backend: CudaBackend, random: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal numbers of the backend's dtype."""
    return torch.randn(shape, device=backend.device, generator=random).to(backend.dtype)


def compare(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raises ConfigError, naming the kernel, where `got` is off."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < _TOLERANCE[want.dtype if want.dtype in _TOLERANCE else torch.float16]:
        raise _off(name, f"by {error:.1e} of its size")


def _off(name: str, amount: str) -> ConfigError:
    return ConfigError(
        f"The CUDA kernel {name} gives wrong results on this GPU ({amount}): update the driver "
        "and nvidia-cuda-nvrtc, or run with the 'ref' kernels."
    )
