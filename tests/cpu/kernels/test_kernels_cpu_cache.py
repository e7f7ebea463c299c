"""RoPE, the cache and attention in C against the reference: every kind, mixed batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from paged import copy_layer, fill, make_batch, make_layer, whole

from nybble.errors import CapacityError, ConfigError
from nybble.kernels import ref_cache
from nybble.kernels.backend import KV_DTYPES, Batch

relaxed = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KINDS = list(KV_DTYPES)
kinds = st.sampled_from(KINDS)


@pytest.fixture(params=[1, 3])
def threads(request):
    """Splitting work among threads is a matter of their number, not of this machine's."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def every_form(backend, *arguments):
    """What attention and both partial attentions say, side by side: (tokens, n)."""
    parts = [backend.partial_attention(*arguments, closed=closed) for closed in (False, True)]
    return torch.cat((backend.attention(*arguments), *parts[0], *parts[1]), 1)


def stretches(batch, page_size):
    """The new tokens of a batch, cut where a page ends: each cut a sequence of one page."""
    cuts = []  # (page, keys, new tokens)
    for s, length in enumerate(batch.lengths.tolist()):
        new = int(batch.starts[s + 1] - batch.starts[s])
        for page, start in enumerate(range(0, length, page_size)):
            keys = min(page_size, length - start)
            if start + keys > length - new:
                cuts.append((batch.pages[s, page], keys, min(keys, start + keys - length + new)))
    pages, keys, new = (torch.tensor(part, dtype=torch.int32) for part in zip(*cuts, strict=True))
    starts = torch.cat((new.new_zeros(1), new.cumsum(0))).int()
    return Batch(batch.slots, pages[:, None], starts, keys, int(new.max()), page_size)


def read(layer, part):
    scales = layer.key_scales if part == "keys" else layer.value_scales
    return ref_cache.dequantize(layer.kind, getattr(layer, part), scales)


@relaxed
@given(
    new=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    half=st.one_of(st.integers(1, 40), st.sampled_from([8, 32, 40, 64])),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    page_size=st.sampled_from([32, 64]),
    kind=kinds,
)
def test_rope_store(cpu, ref, new, half, kv_heads, group, page_size, kind):
    assume(kind != "int6" or half % 2 == 0)  # whole bytes
    dim, heads, tokens = 2 * half, kv_heads * group, sum(new)
    past = [7 * i for i in range(len(new))]
    batch, pages = make_batch(new, past, page_size, seed=half)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    angle, before = torch.rand(tokens, half) * 7, qkv.clone()
    layers = [make_layer(kind, pages, kv_heads, dim, page_size) for _ in "ab"]
    got, expected = (
        backend.rope_store(q, k, v, angle.cos(), angle.sin(), layer, batch)
        for backend, layer in zip((cpu, ref), layers, strict=True)
    )
    assert torch.equal(qkv, before)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        *(read(layer, "values") for layer in layers), atol=0, rtol=0, equal_nan=True
    )
    # A key on the edge of two codes may fall to either side: one step, or fp16's last bit.
    step = {"int8": 0.06, "int6": 0.25, "int4": 0.7}.get(kind, 1e-6)
    relative = {"float16": 1e-3, "bfloat16": 8e-3}.get(kind, 1e-6)
    keys = [read(layer, "keys") for layer in layers]
    torch.testing.assert_close(*keys, atol=step, rtol=relative, equal_nan=True)
    assert ((keys[0] - keys[1]).nan_to_num().abs() > 1e-2).sum() <= 2


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_storing_rounds_every_value_as_torch_does(cpu, kind):
    """All exponents, subnormals, ties, overflow, Inf and NaN."""
    mantissas = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000]
    )
    bits = (torch.arange(256)[:, None] << 23) | torch.cat((mantissas, mantissas + 0x7E0000))
    values = bits.to(torch.int32).view(torch.float32).flatten()
    values = torch.cat((values, -values)).view(-1, 1, 64)  # 256 * 20 * 2 of them
    batch, pages = make_batch([len(values)], [0])
    layer = make_layer(kind, pages, 1)
    fill(cpu, layer, batch, torch.zeros_like(values), values)
    _, stored = ref_cache.gather(layer, batch.pages[0], len(values))
    expected = values[:, 0].to(KV_DTYPES[kind]).float()
    torch.testing.assert_close(stored[0], expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_rounding_at_the_ends(cpu, ref, kind, dim):
    """Zeros, numbers that fp16 cannot hold, Inf and NaN: as the reference has them."""
    x = torch.randn(8, 1, dim)
    x[0], x[1] = 0, x[1] * 1e-9
    x[2], x[3] = x[2] * 1e-6, x[3] * 1e9
    x[4, 0, 3], x[5, 0, 3], x[6, 0, 3] = torch.nan, torch.inf, -torch.inf
    batch, pages = make_batch([8], [0])
    layers = [make_layer(kind, pages, 1, dim) for _ in "ab"]
    for backend, layer in zip((cpu, ref), layers, strict=True):
        fill(backend, layer, batch, torch.zeros_like(x), x)
    got, expected = (ref_cache.gather(layer, batch.pages[0], 8)[1][0] for layer in layers)
    assert torch.equal(got[:3], expected[:3])
    assert torch.equal(got[7], expected[7])
    for values in (got, expected):
        assert not values[3:7, 3].isfinite().any()


@relaxed
@given(
    sequences=st.lists(
        st.tuples(st.one_of(st.just(1), st.integers(1, 70)), st.integers(0, 300)),
        min_size=1,
        max_size=5,
    ),
    dim=st.sampled_from([16, 24, 64, 80, 128]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5]),
    page_size=st.sampled_from([32, 64, 96]),
    kind=kinds,
)
def test_attention(cpu, ref, sequences, dim, kv_heads, group, page_size, kind):
    new, past = zip(*sequences, strict=True)
    batch, pages = make_batch(new, past, page_size)
    every = whole(batch, page_size)
    layer = make_layer(kind, pages, kv_heads, dim, page_size)
    fill(ref, layer, every, *torch.randn(2, int(every.starts[-1]), kv_heads, dim))
    q = torch.randn(sum(new), kv_heads * group, dim)
    got, expected = (every_form(backend, q, layer, batch, dim**-0.5) for backend in (cpu, ref))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@relaxed
@given(
    sequences=st.lists(
        st.tuples(st.one_of(st.just(1), st.integers(1, 150)), st.integers(0, 300)),
        min_size=1,
        max_size=4,
    ),
    dim=st.sampled_from([16, 24, 64]),
    group=st.integers(1, 3),
    page_size=st.sampled_from([32, 64]),
    kind=kinds,
)
def test_parts_make_a_whole(cpu, ref, sequences, dim, group, page_size, kind):
    """The pages before a token's own as they are, and its own as a sequence of one page."""
    new, past = zip(*sequences, strict=True)
    batch, pages = make_batch(new, past, page_size)
    every, own = whole(batch, page_size), stretches(batch, page_size)
    layer = make_layer(kind, pages, 2, dim, page_size)
    fill(ref, layer, every, *torch.randn(2, int(every.starts[-1]), 2, dim))
    q = torch.randn(sum(new), 2 * group, dim)
    before = cpu.partial_attention(q, layer, batch, dim**-0.5, closed=True)
    last = cpu.partial_attention(q, layer, own, dim**-0.5, closed=False)
    got, expected = cpu.merge_attention(before, last), ref.attention(q, layer, batch, dim**-0.5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, ref.merge_attention(before, last), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("page_size", [32, 64])
def test_partial_attention_of_long_rows(cpu, ref, threads, page_size, group, kind):
    """Few rows over many keys are cut into pieces, one thread or several: on both sides of a page's
    end, beside prompts and beside a row that sees nothing."""
    for new, past in (([1], [1999]), ([3, 1, 100], [1022, 900, 64]), ([5, 1], [1500, 0])):
        batch, pages = make_batch(new, past, page_size)
        every, layer = whole(batch, page_size), make_layer(kind, pages, page_size=page_size)
        fill(ref, layer, every, *torch.randn(2, int(every.starts[-1]), 2, 64))
        q = torch.randn(sum(new), 2 * group, 64)
        got, expected = (every_form(backend, q, layer, batch, 0.125) for backend in (cpu, ref))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("new", "past"), [([70], [0]), ([2, 600], [255, 0]), ([256, 1], [0, 30])])
def test_a_row_without_keys_gives_nothing(native, threads, new, past, kind):
    """Even if other rows see a NaN; pages so large that the pieces of long rows come into it."""
    page_size = 256 if sum(new) > 100 else 32
    batch, pages = make_batch(new, past, page_size)
    every, layer = whole(batch, page_size), make_layer(kind, pages, page_size=page_size)
    k, v = torch.randn(2, int(every.starts[-1]), 2, 64)
    v[every.starts[:-1].long()] = torch.nan
    fill(native, layer, every, k, v)
    q = torch.randn(sum(new), 6, 64)
    out, lse = native.partial_attention(q, layer, batch, 0.125, closed=True)
    positions = torch.cat([torch.arange(p, p + n) for n, p in zip(new, past, strict=True)])
    none = positions < page_size
    assert not out[none].any()
    assert torch.equal(lse[none], torch.full_like(lse[none], -torch.inf))
    assert not out[~none].isfinite().any()
    assert lse[~none].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 30, 64])
def test_closed_attention_reads_no_page_that_no_row_sees(native, threads, new, kind):
    """The values of the rows' own page are NaN, which shows even with a weight of 0."""
    batch, pages = make_batch([new], [640 - new], 64)
    layer = make_layer(kind, pages, page_size=64)
    k, v = torch.randn(2, 640, 2, 64)
    v[576:] = torch.nan
    fill(native, layer, whole(batch, 64), k, v)
    q = torch.randn(new, 6, 64)
    out, lse = native.partial_attention(q, layer, batch, 0.125, closed=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3])
def test_a_row_does_not_depend_on_its_batch(native, threads, group, kind):
    """Alone or among others, in one go or in chunks: the same bits."""
    lengths, kv_heads = [700, 200, 1, 90], 2
    batch, pages = make_batch(lengths, [0] * 4)
    layer = make_layer(kind, pages, kv_heads)
    fill(native, layer, batch, *torch.randn(2, sum(lengths), kv_heads, 64))
    q = torch.randn(sum(lengths), kv_heads * group, 64)
    full = every_form(native, q, layer, batch, 0.125)
    for last in ([1, 1, 1, 1], [3, 150, 1, 1], [1, 40, 1, 90]):
        past = [length - n for length, n in zip(lengths, last, strict=True)]
        step, _ = make_batch(last, past)
        stops = batch.starts[1:].tolist()
        rows = torch.cat([torch.arange(s - n, s) for s, n in zip(stops, last, strict=True)])
        got = every_form(native, q[rows], layer, step, 0.125)
        assert torch.equal(got, full[rows])
        for s, n in enumerate(last):
            alone = replace(
                step,
                pages=step.pages[s : s + 1],
                starts=torch.tensor([0, n], dtype=torch.int32),
                lengths=step.lengths[s : s + 1],
            )
            mine = rows[sum(last[:s]) : sum(last[: s + 1])]
            assert torch.equal(every_form(native, q[mine], layer, alone, 0.125), full[mine])


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(native, threads, kind):
    batch, pages = make_batch([1, 3, 200], [1500, 700, 10], 64)
    every, layer = whole(batch, 64), make_layer(kind, pages, page_size=64)
    fill(native, layer, every, *torch.randn(2, int(every.starts[-1]), 2, 64))
    q = torch.randn(204, 6, 64)
    got = every_form(native, q, layer, batch, 0.125)
    torch.set_num_threads(2)
    assert torch.equal(got, every_form(native, q, layer, batch, 0.125))


def random_parts(tokens, heads, dim):
    """Two partial attentions; the first of every third token saw nothing."""
    parts = [(torch.randn(tokens, heads * dim), 9 * torch.randn(tokens, heads)) for _ in "ab"]
    parts[0][0][::3], parts[0][1][::3] = 0, -torch.inf
    return parts


@pytest.mark.parametrize("dim", [16, 24, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 90])
def test_merge_attention(cpu, ref, tokens, dim):
    parts = random_parts(tokens, 3, dim)
    got = cpu.merge_attention(*parts)
    torch.testing.assert_close(got, ref.merge_attention(*parts), atol=1e-6, rtol=1e-5)
    assert torch.equal(got[::3], parts[1][0][::3])


def test_a_merged_row_does_not_depend_on_its_batch(native, threads):
    parts = random_parts(300, 9, 64)
    full = native.merge_attention(*parts)
    for rows in (slice(1), slice(4, 5), slice(7, 20), slice(299, None), slice(0, 300, 7)):
        some = [(out[rows], lse[rows]) for out, lse in parts]
        assert torch.equal(native.merge_attention(*some), full[rows])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [0, 1])
def test_merge_attention_shows_bad_values(cpu, part, bad):
    """Also where the other part outweighs it beyond fp32."""
    for gap in (-200.0, 0.0, 200.0):
        parts = random_parts(2, 3, 64)
        parts[0][1][1], parts[1][1][1] = gap, 0
        parts[part][0][1, 70] = bad
        merged = cpu.merge_attention(*parts)
        assert not merged[1, 70].isfinite()
        assert merged[1, :70].isfinite().all()
        parts[part][1][1, 0] = torch.nan
        assert cpu.merge_attention(*parts)[1, :64].isnan().all()


def test_attention_over_extreme_scores(cpu, ref):
    batch, pages = make_batch([4], [196])
    every, layer = whole(batch), make_layer("float32", pages, 1)
    k, v = torch.randn(2, 200, 1, 64)
    k[:130] *= 1e-3
    fill(ref, layer, every, k, v)
    q = torch.randn(4, 2, 64) * 1e3
    got, expected = (backend.attention(q, layer, batch, 1.0) for backend in (cpu, ref))
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    fill(ref, layer, every, torch.full_like(k, 1e18), v)
    far, (one, _) = torch.full((1, 1, 64), -1e18), make_batch([1], [199])
    torch.testing.assert_close(cpu.attention(far, layer, one, 1.0), v.mean(0))


@pytest.mark.parametrize("size", [1e30, -1e30])
def test_scores_beyond_fp32_are_no_numbers(cpu, ref, size):
    """Whatever their sign: where all are -inf, their sum is that of a row without keys."""
    batch, pages = make_batch([2], [98])
    layer, far = make_layer("float32", pages, 1), torch.full((100, 1, 64), 1e30)
    fill(ref, layer, whole(batch), far, far)
    q = torch.full((2, 1, 64), size)
    for backend in (cpu, ref):
        for closed in (False, True):
            out, lse = backend.partial_attention(q, layer, batch, 1.0, closed=closed)
            assert out.isnan().all()
            assert not lse.isfinite().any()
        assert backend.attention(q, layer, batch, 1.0).isnan().all()


@pytest.mark.parametrize("kind", ["float32", "int8", "int6", "int4"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [1, 60])
def test_attention_shows_bad_values(cpu, where, bad, tokens, kind):
    batch, pages = make_batch([tokens], [140 - tokens])
    q = torch.rand(tokens, 2, 64) + 0.1
    k, v = torch.rand(2, 140, 1, 64) + 0.1
    {"q": q, "k": k, "v": v}[where][0, 0, 3] = bad
    layer = make_layer(kind, pages, 1)
    fill(cpu, layer, whole(batch), k, v)
    assert not torch.isfinite(cpu.attention(q, layer, batch, 0.1)[0]).all()
    for closed in (False, True):
        out, _ = cpu.partial_attention(q, layer, batch, 0.1, closed=closed)
        assert not torch.isfinite(out[0]).all()


def test_a_bad_sequence_harms_no_other(native):
    batch, pages = make_batch([1, 1], [50, 300])
    layer = make_layer("float16", pages, 1)
    every = whole(batch)
    k, v = torch.randn(2, int(every.starts[-1]), 1, 64)
    k[20] = torch.nan
    fill(native, layer, every, k, v)
    got = native.attention(torch.randn(2, 1, 64), layer, batch, 0.1)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


def test_attention_refuses_what_does_not_fit(native):
    batch, pages = make_batch([5], [90])
    q, layer = torch.randn(5, 4, 64), make_layer("float32", pages)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.attention(q, make_layer("float32", pages - 1), batch, 1.0)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.attention(q, layer, replace(batch, pages=batch.pages - 9), 1.0)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.attention(q, layer, replace(batch, lengths=batch.lengths + 32), 1.0)
    with pytest.raises(ConfigError, match="own row and key"):
        native.attention(q, layer, replace(batch, lengths=batch.lengths - 91), 1.0)
    with pytest.raises(ConfigError, match="own row and key"):
        native.attention(q[:4], layer, batch, 1.0)
    longer = replace(batch, lengths=batch.lengths + 32)
    for closed in (False, True):
        with pytest.raises(CapacityError, match="not in the cache"):
            native.partial_attention(q, layer, longer, 1.0, closed=closed)
    with pytest.raises(ConfigError, match="multiple of 2"):
        native.attention(q[:, :3], layer, batch, 1.0)
    with pytest.raises(ConfigError, match="heads of 32"):
        native.attention(q, make_layer("float32", pages, dim=32), batch, 1.0)


def test_merge_attention_refuses_what_does_not_fit(native):
    first, second = random_parts(3, 2, 64)
    with pytest.raises(ConfigError, match="same rows"):
        native.merge_attention(first, (second[0][:2], second[1]))
    with pytest.raises(ConfigError, match="same rows"):
        native.merge_attention((first[0], first[1][:2]), second)
    with pytest.raises(ConfigError, match="rows of 128"):
        native.merge_attention(first, (second[0][:, :64], second[1]))


def test_rope_store_refuses_what_does_not_fit(native):
    batch, pages = make_batch([5], [30])
    q, turn, layer = torch.randn(5, 2, 64), torch.zeros(5, 32), make_layer("int8", pages)
    before = copy_layer(layer)
    with pytest.raises(CapacityError, match="not in the cache"):
        native.rope_store(q, q, q, turn, turn, layer, replace(batch, slots=batch.slots + 64))
    with pytest.raises(CapacityError, match="not in the cache"):
        native.rope_store(q, q, q, turn, turn, layer, replace(batch, slots=batch.slots - 99))
    with pytest.raises(ConfigError, match="one row a token"):
        native.rope_store(q, q, q, turn[:4], turn[:4], layer, batch)
    with pytest.raises(ConfigError, match="differ in tokens"):
        native.rope_store(q, q, q[:4], turn, turn, layer, batch)
    assert torch.equal(layer.keys, before.keys)
