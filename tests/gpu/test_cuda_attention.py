"""The CUDA attention kernels against the reference, on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch
from paged_samples import PROMPTS, empty_layer, fill, make_batch, pages_of, poison, relative_error

from nybble.errors import CapacityError, ConfigError
from nybble.kernels.ref import RefBackend

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nybble.kernels.cuda.attention import PagedAttention, split_count
from nybble.kernels.cuda.backend import CudaBackend

KINDS = ["float16", "bfloat16", "int8", "int6", "int4"]
# Whether prompts take the kernel of compute capability 9.0, where there is a choice.
HOPPER = [False, True] if torch.cuda.get_device_capability() == (9, 0) else [False]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def compare(
    new: list[int],
    lengths: list[int],
    *,
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
    q = torch.randn(sum(new), heads[0], head_dim, device="cuda").to(dtype)
    scale = head_dim**-0.5
    want = RefBackend("cuda", torch.float32).attention(q.float(), layer, batch, scale)
    poison(sum(new), heads[0] * head_dim, dtype=dtype)
    got = PagedAttention(q.device, dtype, hopper=hopper)(q, layer, batch, scale)
    limit = TOLERANCE[torch.bfloat16 if kind == "bfloat16" else dtype]
    assert relative_error(got, want) < limit
    rows = (got - want).double().norm(dim=1) / want.double().norm(dim=1)
    assert rows.max() < 4 * limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (9, 3), (24, 2)])
def test_decode(heads, head_dim, kind, dtype):
    for lengths in ([1], [2, 17, 63, 64, 65], [700, 1, 129, 33], [3000]):
        compare(
            [1] * len(lengths),
            lengths,
            heads=heads,
            head_dim=head_dim,
            kind=kind,
            dtype=dtype,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [9000, 32768])
def test_decode_of_long_contexts(length, kind):
    compare([1], [length], heads=(8, 8), kind=kind)
    compare([1, 1], [length, 31], heads=(8, 1), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_below_its_bound(kind):
    """A graph is captured for the longest context and then run for shorter ones."""
    for lengths in ([1], [5, 300], [64, 2000]):
        compare([1] * len(lengths), lengths, kind=kind, bound=32768)


@pytest.mark.parametrize("hopper", HOPPER)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_prefill(heads, head_dim, kind, dtype, hopper):
    for new, lengths in PROMPTS:
        compare(
            new,
            lengths,
            heads=heads,
            head_dim=head_dim,
            kind=kind,
            dtype=dtype,
            hopper=hopper,
        )


@pytest.mark.parametrize("hopper", HOPPER)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_mixed_batches(page_size, kind, hopper):
    new, lengths = [1, 130, 1, 17, 1], [400, 130, 1, 90, 65]
    compare(new, lengths, heads=(6, 2), kind=kind, page_size=page_size, hopper=hopper)


@pytest.mark.parametrize("hopper", HOPPER)
def test_a_long_prompt(hopper):
    compare([4096], [4096], heads=(2, 2), hopper=hopper)
    for kind in ("int6", "int4"):
        compare([1000], [20000], heads=(2, 1), kind=kind, hopper=hopper)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [1, 40])
def test_a_nan_stays_in_its_head_and_is_seen(new, kind):
    lengths = [200, 200]
    batch = make_batch([new, new], lengths)
    layer = empty_layer(kind, pages_of(lengths), 2, 128)
    fill(layer, batch, lengths)
    page = int(batch.pages[1, 1])
    (layer.values if layer.value_scales is None else layer.value_scales)[page, 1, 5] = torch.nan
    q = torch.randn(2 * new, 2, 128, device="cuda").half()
    out = CudaBackend("cuda").attention(q, layer, batch, 0.1).view(2, new, 2, 128)
    assert out[1, :, 1].isnan().any(-1).all()
    assert not out[0].isnan().any()
    assert not out[1, :, 0].isnan().any()


def test_scores_that_grow_raise_the_maximum():
    """The largest key comes last, by far: everything summed before must shrink to nothing."""
    for new in (1, 64):
        batch = make_batch([new], [2000])
        layer = empty_layer("float16", pages_of([2000]), 1, 128)
        fill(layer, batch, [2000])
        factors = torch.logspace(-2, 1.5, 32, device="cuda").half()
        layer.keys[batch.pages[0, :32].long()] *= factors.view(-1, 1, 1, 1)
        q = torch.randn(new, 1, 128, device="cuda").half()
        want = RefBackend("cuda").attention(q.float(), layer, batch, 0.3)
        got = CudaBackend("cuda").attention(q, layer, batch, 0.3)
        assert relative_error(got, want) < 3e-3


@pytest.mark.parametrize("kind", KINDS)
def test_graph_with_changing_lengths(kind):
    longest, heads = 3000, 4
    attention = CudaBackend("cuda")
    batch = make_batch([1, 1], [longest, longest])
    layer = empty_layer(kind, pages_of([longest] * 2), heads, 128)
    fill(layer, batch, [longest] * 2)
    q = torch.randn(2, heads, 128, device="cuda").half()
    attention.attention(q, layer, batch, 0.09)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.attention(q, layer, batch, 0.09)
    for lengths in ([1, 3000], [2999, 64], [65, 17], [1000, 1001]):
        batch.lengths.copy_(torch.tensor(lengths))
        q.normal_()
        graph.replay()
        want = RefBackend("cuda").attention(q.float(), layer, batch, 0.09)
        assert (
            relative_error(out, want) < TOLERANCE[torch.bfloat16 if kind == "bfloat16" else q.dtype]
        )


def test_repeated_runs_are_equal():
    """Which block comes last differs from run to run; what it adds up does not."""
    batch = make_batch([1] * 3, [5000, 700, 3])
    layer = empty_layer("int8", pages_of([5000, 700, 3]), 2, 128)
    fill(layer, batch, [5000, 700, 3])
    q = torch.randn(3, 8, 128, device="cuda").half()
    attention = CudaBackend("cuda")
    first = attention.attention(q, layer, batch, 0.1)
    assert all(torch.equal(first, attention.attention(q, layer, batch, 0.1)) for _ in range(50))


def test_split_count_fills_the_places():
    assert split_count(1, 1, 264) == 1
    assert split_count(1000, 100, 264) == 1
    assert split_count(64, 1000, 264) >= 4
    assert split_count(8, 3, 264) == 3


def test_refusals():
    attention = PagedAttention(torch.device("cuda", 0), torch.float16)
    batch = make_batch([1], [1])
    q = torch.zeros(1, 2, 80, device="cuda").half()
    with pytest.raises(ConfigError, match="80"):
        attention(q, empty_layer("float16", 4, 2, 80), batch, 1.0)
    q = torch.zeros(1, 2, 64, device="cuda").half()
    with pytest.raises(ConfigError, match="kv-dtype"):
        attention(q, empty_layer("float32", 4, 2, 64), batch, 1.0)
    with pytest.raises(ConfigError, match="convert them"):
        attention(
            q,
            empty_layer("float16", 4, 2, 64).__class__(
                "float16", *(torch.zeros(4, 2, 64, 64).half() for _ in range(2))
            ),
            batch,
            1.0,
        )
    lengths = [1] * 40000
    many = make_batch(lengths, lengths, page_size=32)
    with pytest.raises(CapacityError, match="at most"):
        attention(
            torch.zeros(40000, 2, 64, device="cuda").half(),
            empty_layer("float16", 4, 2, 64, page_size=32),
            many,
            1.0,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_little_shared_memory(kind, dtype, monkeypatch):
    """As on compute capability 8.6, 8.9 and 12.0."""
    build = PagedAttention.__init__

    def small(self, *args, **options):
        build(self, *args, **options)
        self._block_shared = 98 * 1024

    monkeypatch.setattr(PagedAttention, "__init__", small)
    compare([200, 1, 130], [500, 700, 130], heads=(4, 2), kind=kind, dtype=dtype, hopper=False)
    compare([1] * 3, [700, 33, 3000], heads=(4, 2), kind=kind, dtype=dtype)
