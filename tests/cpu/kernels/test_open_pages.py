"""Attention with open pages: each token's own page exactly, those before it as codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from paged import copy_layer, make_batch, make_layer, whole

from nybble.cache.store import open_step
from nybble.errors import ConfigError
from nybble.kernels import open_pages, ref_cache
from nybble.kernels.backend import Batch, KVLayer
from nybble.kernels.ref import RefBackend

REF = RefBackend()
HEADS, KV_HEADS, DIM, SIZE = 4, 2, 64, 64


def seated(pages: int, seats: int = 4) -> KVLayer:
    layer = make_layer("int4", pages, KV_HEADS, DIM, SIZE)
    return replace(layer, seats=make_layer("float16", seats, KV_HEADS, DIM, SIZE))


def opened(batch: Batch, spans, seats) -> Batch:
    step = open_step(spans, seats, SIZE, torch.device("cpu"))
    if any(end - begin > 1 for begin, end in spans):
        step = replace(step, pages=make_layer("float16", 40, KV_HEADS, DIM, SIZE))
    return replace(batch, open_step=step)


def run(backend, layer, batch, q, k, v, query_scale=None):
    turn = torch.zeros(len(q), DIM // 2)
    return open_pages.attention(
        backend, (q, k, v), (turn + 1, turn), layer, batch, 0.2, query_scale
    )


def numbers(tokens: int):
    q = torch.randn(tokens, HEADS, DIM)
    k, v = torch.randn(2, tokens, KV_HEADS, DIM)
    return q, k.half().float(), v.half().float()


def test_it_is_the_softmax_over_codes_and_the_own_page():
    length = 200
    batch, pages = make_batch([length], [0], SIZE)
    layer, (q, k, v) = seated(pages), numbers(length)
    got = run(REF, layer, opened(batch, [(0, length)], [2]), q, k, v).view(length, HEADS, DIM)

    turned = ref_cache.hadamard(k)
    coded = [torch.empty(length, KV_HEADS, DIM) for _ in range(2)]
    for x, out in zip((turned, v), coded, strict=True):
        codes, scales = ref_cache._quantize_int4(x)
        out.copy_(ref_cache.dequantize("int4", codes, scales))
    far_k, far_v = ref_cache.hadamard(coded[0]), coded[1]
    for p in (0, 63, 64, 130, 199):
        first = p // SIZE * SIZE
        keys = torch.cat((far_k[:first], k[first : p + 1])).repeat_interleave(2, 1)
        values = torch.cat((far_v[:first], v[first : p + 1])).repeat_interleave(2, 1)
        weights = (torch.einsum("hd,nhd->hn", q[p], keys) * 0.2).softmax(-1)
        expected = torch.einsum("hn,nhd->hd", weights, values)
        torch.testing.assert_close(got[p], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[1] * 150, [64, 64, 22], [70, 1, 9, 60, 10], [149, 1], [150]])
def test_cutting_a_prompt_changes_nothing(cuts):
    length = sum(cuts)
    batch, pages = make_batch([length], [0], SIZE)
    q, k, v = numbers(length)
    expected = run(REF, seated(pages), opened(batch, [(0, length)], [0]), q, k, v)
    layer, begin, parts = seated(pages), 0, []
    for count in cuts:
        end = begin + count
        step, _ = make_batch([count], [begin], SIZE)
        step = replace(step, pages=batch.pages, slots=batch.slots[begin:end])
        rows = slice(begin, end)
        parts.append(run(REF, layer, opened(step, [(begin, end)], [3]), q[rows], k[rows], v[rows]))
        begin = end
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-5, rtol=1e-5)


def test_sequences_keep_to_their_own_seats():
    new, past = [1, 40, 1, 100], [70, 30, 64, 0]
    batch, pages = make_batch(new, past, SIZE)
    before = whole(batch, SIZE)
    layer, total = seated(pages, 6), int(before.starts[-1])
    q, k, v = numbers(total)
    spans = [(0, n) for n in before.lengths.tolist()]
    expected = run(REF, copy(layer), opened(before, spans, [5, 1, 0, 3]), q, k, v)

    first = [p for p in past if p]
    seats = [5, 1, 0]
    starts = before.starts.tolist()
    old = torch.cat([torch.arange(a, a + p) for a, p in zip(starts, past, strict=False) if p])
    history = Batch(
        slots=before.slots[old],
        pages=batch.pages[:3],
        starts=torch.tensor([0, *first]).cumsum(0).int(),
        lengths=torch.tensor(first).int(),
        max_query=max(first),
        max_length=max(first),
    )
    run(REF, layer, opened(history, [(0, p) for p in first], seats), q[old], k[old], v[old])
    rows = torch.cat(
        [torch.arange(a + p, a + p + n) for a, p, n in zip(starts, past, new, strict=False)]
    )
    spans = [(p, p + n) for p, n in zip(past, new, strict=True)]
    got = run(REF, layer, opened(batch, spans, [5, 1, 0, 3]), q[rows], k[rows], v[rows])
    torch.testing.assert_close(got, expected[rows], atol=1e-5, rtol=1e-5)


def test_queries_are_scaled_for_both_parts():
    batch, pages = make_batch([100], [0], SIZE)
    q, k, v = numbers(100)
    scale = torch.rand(100, 1, 1) + 0.5
    step = opened(batch, [(0, 100)], [0])
    got = run(REF, seated(pages), step, q, k, v, scale)
    torch.testing.assert_close(got, run(REF, seated(pages), step, q * scale, k, v))


def test_a_batch_without_seats_is_refused():
    batch, pages = make_batch([3], [0], SIZE)
    with pytest.raises(ConfigError, match="seats"):
        run(REF, seated(pages), batch, *numbers(3))


def copy(layer: KVLayer) -> KVLayer:
    return replace(copy_layer(layer), seats=copy_layer(layer.seats))
