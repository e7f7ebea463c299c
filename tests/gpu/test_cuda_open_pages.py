"""Attention in two parts, and an int4 cache with open pages, against the reference on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged_samples import (
    PROMPTS,
    batch_of,
    clone,
    empty_layer,
    fill,
    make_batch,
    pages_of,
    poison,
    random_qkv,
    random_rotary,
    relative_error,
)

from nybble.cache.store import open_step
from nybble.kernels import open_pages
from nybble.kernels.backend import OpenStep
from nybble.kernels.ref import RefBackend

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nybble.kernels.cuda.attention import PagedAttention
from nybble.kernels.cuda.backend import CudaBackend

KINDS = ["float16", "bfloat16", "int8", "int6", "int4"]
DTYPES = [torch.float16, torch.bfloat16]
HOPPER = [False, True] if torch.cuda.get_device_capability() == (9, 0) else [False]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICE = torch.device("cuda")


def compare(
    new: list[int],
    lengths: list[int],
    *,
    closed: bool,
    heads: tuple[int, int] = (4, 4),
    head_dim: int = 128,
    kind: str = "float16",
    dtype: torch.dtype = torch.float16,
    hopper: bool | None = None,
    **options: int,
) -> None:
    """options: those of make_batch."""
    batch = make_batch(new, lengths, **options)
    page_size = options.get("page_size", 64)
    layer = empty_layer(kind, pages_of(lengths, page_size), heads[1], head_dim, page_size=page_size)
    fill(layer, batch, lengths)
    q = torch.randn(sum(new), heads[0], head_dim, device=DEVICE).to(dtype)
    scale = head_dim**-0.5
    reference = RefBackend(DEVICE, torch.float32)
    want, want_lse = reference.partial_attention(q.float(), layer, batch, scale, closed=closed)
    poison(sum(new), heads[0] * head_dim, dtype=dtype)
    poison(sum(new), heads[0], dtype=torch.float32)
    attention = PagedAttention(q.device, dtype, hopper=hopper)
    got, lse = attention.partial(q, layer, batch, scale, closed=closed)
    blind = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind)
    assert not got.view(q.shape)[blind].any()
    limit, coarse = TOLERANCE[torch.bfloat16 if kind == "bfloat16" else dtype], kind == "bfloat16"
    torch.testing.assert_close(lse[~blind], want_lse[~blind], rtol=0, atol=5e-2 if coarse else 1e-2)
    assert relative_error(got, want) < limit
    rows = (got - want).double().norm(dim=1) / want.double().norm(dim=1).clamp_min(1e-30)
    assert rows.max() < 4 * limit
    if not closed:
        assert torch.equal(got, attention(q, layer, batch, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (9, 3), (24, 2)])
@pytest.mark.parametrize("closed", [False, True])
def test_single_tokens(closed, heads, head_dim, kind, dtype):
    options = {"heads": heads, "head_dim": head_dim, "kind": kind, "dtype": dtype}
    for lengths in ([1], [64], [65], [2, 63, 128, 129], [700, 1, 300, 33], [3000]):
        compare([1] * len(lengths), lengths, closed=closed, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("closed", [False, True])
def test_single_tokens_below_their_bound(closed, kind):
    """The keys of the longest context are split among blocks of which a short one needs few."""
    for lengths in ([10], [64], [65], [10, 5000], [20000, 10, 129]):
        compare([1] * len(lengths), lengths, closed=closed, kind=kind, bound=30720)


@pytest.mark.parametrize("hopper", HOPPER)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("closed", [False, True])
def test_prompts(closed, heads, head_dim, kind, dtype, hopper):
    for new, lengths in PROMPTS:
        compare(
            new,
            lengths,
            closed=closed,
            heads=heads,
            head_dim=head_dim,
            kind=kind,
            dtype=dtype,
            hopper=hopper,
        )


@pytest.mark.parametrize("hopper", HOPPER)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize("closed", [False, True])
def test_mixed_batches(closed, page_size, kind, hopper):
    new, lengths = [1, 130, 1, 17, 1, 40, 2], [400, 130, 1, 90, 65, 40, 129]
    compare(
        new, lengths, closed=closed, heads=(6, 2), kind=kind, page_size=page_size, hopper=hopper
    )


@pytest.mark.parametrize("hopper", HOPPER)
@pytest.mark.parametrize("closed", [False, True])
def test_long_prompts(closed, hopper):
    for kind in ("float16", "int4"):
        compare([4096], [4096], closed=closed, heads=(2, 2), kind=kind, hopper=hopper)
        compare([1000], [20000], closed=closed, heads=(2, 1), kind=kind, hopper=hopper)


@pytest.mark.parametrize("hopper", HOPPER)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_short_stretches(head_dim, dtype, hopper):
    lengths = [i * 37 % 64 + 1 for i in range(150)]
    new = [max(1, length * (i % 4) // 3) for i, length in enumerate(lengths)]
    assert min(new) == 1
    assert max(new) == 64
    options = {"head_dim": head_dim, "dtype": dtype, "hopper": hopper}
    compare(new, lengths, closed=False, heads=(4, 2), **options)
    compare([1] * 150, lengths, closed=False, heads=(4, 2), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 40])
def test_a_nan_is_seen_in_closed_pages_alone(new, kind):
    lengths = [200, 200]
    batch = make_batch([new, new], lengths)
    layer = empty_layer(kind, pages_of(lengths), 2, 128)
    fill(layer, batch, lengths)
    q = torch.randn(2 * new, 2, 128, device=DEVICE).half()
    values = layer.values if layer.value_scales is None else layer.value_scales
    keys = layer.keys if layer.key_scales is None else layer.key_scales
    keys[batch.pages[0, 3].long(), :, 5] = torch.nan  # positions 192 and on: nobody's closed page
    values[batch.pages[1, 1].long(), 1, 5] = torch.nan
    backend = CudaBackend(DEVICE)
    out, lse = backend.partial_attention(q, layer, batch, 0.1, closed=True)
    out = out.view(2, new, 2, 128)
    assert out[0].isfinite().all()
    assert lse.isfinite().all()
    assert out[1, :, 1].isnan().any(-1).all()
    assert out[1, :, 0].isfinite().all()
    q[0, 0, 7] = torch.nan
    out, lse = backend.partial_attention(q, layer, batch, 0.1, closed=True)
    assert out.view(2 * new, 2, 128)[0, 0].isnan().all()
    assert lse[0, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (9, 64), (64, 128)])
def test_merge(heads, head_dim, dtype):
    backend, reference = CudaBackend(DEVICE, dtype), RefBackend(DEVICE, torch.float32)
    for tokens in (1, 7, 300):
        outs = torch.randn(2, tokens, heads * head_dim, device=DEVICE).to(dtype)
        lse = torch.randn(2, tokens, heads, device=DEVICE) * 4
        blind = torch.rand(tokens, heads, device=DEVICE) < 0.3
        blind[0, 0] = True
        outs[0].view(tokens, heads, head_dim)[blind] = 0
        lse[0][blind] = -torch.inf
        got = backend.merge_attention((outs[0], lse[0]), (outs[1], lse[1]))
        wide = outs.float()
        want = reference.merge_attention((wide[0], lse[0]), (wide[1], lse[1]))
        assert relative_error(got, want) < TOLERANCE[dtype]
        shape = (tokens, heads, head_dim)
        assert torch.equal(got.view(shape)[blind], outs[1].view(shape)[blind])


def test_merging_parts_gives_the_whole():
    """Closed pages and own pages of one fp16 cache, of rows that are in the same page each."""
    new, lengths = [1, 20, 5], [400, 149, 133]
    batch = make_batch(new, lengths)
    layer = empty_layer("float16", pages_of(lengths), 2, 128)
    fill(layer, batch, lengths)
    own = batch_of(
        torch.stack([batch.pages[s, (n - 1) // 64] for s, n in enumerate(lengths)])[:, None],
        [((n - count) % 64, (n - 1) % 64 + 1) for count, n in zip(new, lengths, strict=True)],
    )
    q = torch.randn(sum(new), 4, 128, device=DEVICE).half()
    backend = CudaBackend(DEVICE)
    parts = (
        backend.partial_attention(q, layer, batch, 0.1, closed=True),
        backend.partial_attention(q, layer, own, 0.1, closed=False),
    )
    whole = backend.attention(q, layer, batch, 0.1)
    assert relative_error(backend.merge_attention(*parts), whole) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (14, 2)])
def test_an_int4_cache_with_open_pages(heads, kv_heads, head_dim, dtype):
    """Prompts in chunks, then tokens; the reference has a cache of its own."""
    backend, reference = CudaBackend(DEVICE, dtype), RefBackend(DEVICE, torch.float32)
    table = torch.randperm(12).int().view(3, 4)
    layer = replace(
        empty_layer("int4", 12, kv_heads, head_dim),
        seats=empty_layer("float16", 4, kv_heads, head_dim),
    )
    other = clone(layer)
    seats = (2, 0, 3)
    for spans in (
        ((0, 100), (0, 30), (0, 1)),
        ((100, 163), (30, 31), (1, 64)),
        ((163, 230), (31, 33), (64, 66)),
        ((230, 231), (33, 34), (66, 67)),
        ((231, 232), (34, 35), (67, 68)),
    ):
        batch = batch_of(table, spans)
        step = open_step(spans, seats, 64, DEVICE)
        tokens, stretches = len(batch.slots), step.batch.sequences
        qkv = random_qkv(tokens, heads, kv_heads, head_dim, dtype)
        rotary = random_rotary(tokens, head_dim)
        outs = []
        for one, cache in ((backend, layer), (reference, other)):
            pages = empty_layer("float16", stretches, kv_heads, head_dim)
            taken = step if batch.max_query == 1 else replace(step, pages=pages)
            x = qkv if one is backend else tuple(part.float() for part in qkv)
            with_step = replace(batch, open_step=taken)
            outs.append(open_pages.attention(one, x, rotary, cache, with_step, head_dim**-0.5))
        got, want = outs
        assert got.dtype == dtype
        assert relative_error(got, want) < {torch.float16: 1e-2, torch.bfloat16: 2e-2}[dtype]


def test_open_pages_in_a_graph():
    """Captured once, replayed where a page begins, ends, and where no page is closed yet."""
    heads, longest = 4, 600
    backend, reference = CudaBackend(DEVICE), RefBackend(DEVICE, torch.float32)
    batch = make_batch([1, 1], [longest, longest])
    own = make_batch([1, 1], [64, 64])
    layer = empty_layer("int4", pages_of([longest] * 2), heads, 128)
    layer = replace(layer, seats=empty_layer("float16", pages_of([64] * 2), heads, 128))
    fill(layer, batch, [longest] * 2)
    fill(layer.seats, own, [64] * 2)
    batch = replace(batch, open_step=OpenStep(own))
    other = clone(layer)
    qkv = torch.randn(2, 3 * heads, 128, device=DEVICE).half()
    rotary = random_rotary(2, 128)

    def attend(one, x, cache):
        return open_pages.attention(one, x.split(heads, dim=1), rotary, cache, batch, 0.09)

    attend(backend, qkv, layer)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(backend, qkv, layer)
    for position in (0, 1, 62, 63, 64, 65, 127, 128, 599):
        for part, at in ((batch, position), (own, position % 64)):
            part.lengths.fill_(at + 1)
            part.slots.copy_(part.pages[:, at // 64] * 64 + at % 64)
        qkv.normal_()
        graph.replay()
        assert relative_error(got, attend(reference, qkv.float(), other)) < 1e-2
