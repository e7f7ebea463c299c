"""The CUDA row kernels and the cache's writes against the reference, on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch
from paged_samples import clone, empty_layer, make_batch, pages_of, random_qkv, random_rotary

from nybble.errors import ConfigError
from nybble.kernels import ref_cache
from nybble.kernels.ref import RefBackend

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nybble.kernels.cuda.backend import CudaBackend

DTYPES = [torch.float16, torch.bfloat16]
ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one unit in the last place


def backends(dtype: torch.dtype) -> tuple[CudaBackend, RefBackend]:
    return CudaBackend("cuda", dtype), RefBackend("cuda", dtype)


def assert_rounded_alike(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same to within one rounding of each number."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=ROUNDING[want.dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 128, 512, 520, 576, 2048, 5120, 8192, 16384])
def test_rms_norm(dim, dtype):
    fast, slow = backends(dtype)
    weight = torch.randn(dim, device="cuda").to(dtype)
    for tokens in (1, 7, 300):
        x = (torch.randn(tokens, dim, device="cuda") * 5).to(dtype)
        assert_rounded_alike(fast.rms_norm(x, weight, 1e-6), slow.rms_norm(x, weight, 1e-6))


def test_rms_norm_of_heads_in_a_wider_matrix():
    fast, slow = backends(torch.float16)
    q, k, _ = random_qkv(37, 6, 2, 128, torch.float16)
    weight = torch.randn(128, device="cuda").half()
    for x in (q, k, k[:, :, 1:][:, :, :120], q.transpose(0, 1)):
        got = fast.rms_norm(x, weight[: x.shape[2]], 1e-5)
        assert_rounded_alike(got, slow.rms_norm(x, weight[: x.shape[2]], 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 1536, 24576])
def test_silu_mul(width, dtype):
    fast, slow = backends(dtype)
    for tokens in (1, 19):
        x = (torch.randn(tokens, 2 * width, device="cuda") * 6).to(dtype)
        assert_rounded_alike(fast.silu_mul(x), slow.silu_mul(x))
    wide = torch.randn(5, 2 * width + 16, device="cuda").to(dtype)
    part = wide[:, 8:-8]
    assert_rounded_alike(fast.silu_mul(part), slow.silu_mul(part))


def test_rows_of_no_tokens_and_rows_with_nan():
    fast, _ = backends(torch.float16)
    weight = torch.ones(64, device="cuda").half()
    assert fast.rms_norm(torch.empty(0, 64, device="cuda").half(), weight, 1e-6).shape == (0, 64)
    x = torch.randn(9, 64, device="cuda").half()
    x[4, 3] = torch.nan
    bad = fast.rms_norm(x, weight, 1e-6).isnan()
    assert bad[4].all()
    assert bad.sum() == 64
    assert fast.silu_mul(x).isnan().sum() == 1


def test_rows_that_are_refused():
    fast, _ = backends(torch.float16)
    with pytest.raises(ConfigError, match="multiple of 8"):
        fast.rms_norm(torch.zeros(2, 12, device="cuda").half(), torch.ones(12).half().cuda(), 1e-6)
    with pytest.raises(ConfigError, match="convert it"):
        fast.silu_mul(torch.zeros(2, 16, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8", "int6", "int4"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("page_size", [32, 64])
def test_rope_store(page_size, heads, kv_heads, head_dim, kind, dtype):
    fast, slow = backends(dtype)
    new, lengths = [5, 1, 40], [70, 3, 40]
    batch = make_batch(new, lengths, page_size=page_size)
    pages = pages_of(lengths, page_size)
    got = empty_layer(kind, pages, kv_heads, head_dim, page_size=page_size)
    want = clone(got)
    q, k, v = random_qkv(sum(new), heads, kv_heads, head_dim, dtype)
    rotary = random_rotary(sum(new), head_dim)
    turned = fast.rope_store(q, k, v, *rotary, got, batch)
    assert_rounded_alike(turned, slow.rope_store(q, k, v, *rotary, want, batch))
    for ours, theirs, our_scales, their_scales in (
        (got.keys, want.keys, got.key_scales, want.key_scales),
        (got.values, want.values, got.value_scales, want.value_scales),
    ):
        assert_same_cache(kind, ours, theirs, our_scales, their_scales)


def assert_same_cache(kind, got, want, got_scales, want_scales):
    """Written slots agree, all others are as they were."""
    if want_scales is None:
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(
            got.float(), want.float(), rtol=ROUNDING[want.dtype], atol=1e-5, equal_nan=True
        )
        return
    torch.testing.assert_close(got_scales, want_scales, rtol=2**-9, atol=1e-6, equal_nan=True)
    untouched = want_scales[..., 0, 0].isnan() if kind == "int4" else want_scales.isnan()
    assert torch.equal(got[untouched], want[untouched])
    # A number between two codes may fall to either side.
    x, y = (
        ref_cache.dequantize(kind, c[~untouched], s[~untouched])
        for c, s in ((got, got_scales), (want, want_scales))
    )
    step = (want_scales[..., 0].amax(-1) if kind == "int4" else want_scales)[~untouched].float()
    assert ((x - y).abs() <= 1.01 * step.unsqueeze(-1)).all()
    assert ((x - y).abs() <= 0.01 * step.unsqueeze(-1)).float().mean() > 0.99


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
def test_nan_reaches_the_scale(kind):
    fast, _ = backends(torch.float16)
    batch = make_batch([3], [3])
    layer = empty_layer(kind, pages_of([3]), 2, 128)
    q, k, v = (x.clone() for x in random_qkv(3, 2, 2, 128, torch.float16))
    k[1, 0, 17] = torch.nan
    v[2, 1, 90] = torch.nan
    fast.rope_store(q, k, v, *random_rotary(3, 128), layer, batch)
    keys, values = ref_cache.gather(layer, batch.pages[0], 3)  # (kv_heads, length, head_dim)
    assert keys.isnan().any(-1).tolist() == [[False, True, False], [False] * 3]
    assert values.isnan().any(-1).tolist() == [[False] * 3, [False, False, True]]


@pytest.mark.parametrize("kind", ["int8", "int6", "int4"])
def test_zeros_and_constants_are_kept(kind):
    fast, _ = backends(torch.float16)
    batch = make_batch([2], [2])
    layer = empty_layer(kind, pages_of([2]), 2, 64)
    v = torch.zeros(2, 2, 64, device="cuda").half()
    v[1] = 2.0
    fast.rope_store(v, v, v, *random_rotary(2, 64), layer, batch)
    _, values = ref_cache.gather(layer, batch.pages[0], 2)
    torch.testing.assert_close(values.transpose(0, 1), v.float(), rtol=1e-3, atol=0)
