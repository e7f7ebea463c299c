"""The CUDA backend as a whole: products, the self-test, a whole decoder, on an NVIDIA GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from paged_samples import empty_layer, fill, make_batch, pages_of, relative_error
from toy import write_llama

from nybble import LLM, SamplingParams
from nybble.bench import shapes
from nybble.checkpoint import Checkpoint
from nybble.engine.engine import Engine
from nybble.errors import ConfigError
from nybble.kernels import choose_backend, ref
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.ref import RefBackend
from nybble.model import read_model_config
from nybble.model.loader import load_decoder

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from nybble.kernels.cuda import selftest, selftest_ops
from nybble.kernels.cuda.backend import CudaBackend

KINDS = ["float16", "bfloat16", "int8", "int6", "int4"]


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def test_is_chosen_on_a_gpu():
    backend, choice = choose_backend("cuda")
    assert backend.name == choice.kernel == "cuda"
    assert choose_backend("cuda", "ref")[0].name == "ref"


def test_products(random):
    fast, slow = CudaBackend("cuda"), RefBackend("cuda", torch.float16)
    weight = torch.randn(100, 64, device="cuda").half()
    bias = torch.randn(100, device="cuda").half()
    x = torch.randn(9, 64, device="cuda").half()
    for b in (None, bias):
        want = slow.dense_linear(weight, b)(x)
        assert relative_error(fast.dense_linear(weight, b)(x), want) < 1e-3
    assert relative_error(fast.head_linear(weight)(x), slow.head_linear(weight)(x)) < 1e-3
    # The last one is a group size that the packed kernels do not take.
    for group_size in (32, 64, 96):
        matrix = random_matrix(192, 72, group_size=group_size, random=random)
        x = torch.randn(5, 192, device="cuda").half()
        want = slow.quant_linear(matrix, None)(x)
        assert relative_error(fast.quant_linear(matrix, None)(x), want) < 2e-3
        assert bool(fast.choose(matrix).refused) == (group_size == 96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("permuted", [False, True])
def test_parts_of_a_block_give_what_their_steps_give(permuted, dtype, random):
    """Also where one part leaves its result in the order that the next one reads."""
    backend = CudaBackend("cuda", dtype)

    def matrix(inputs: int, outputs: int):
        made = random_matrix(inputs, outputs, scale=0.01, scale_dtype=dtype, random=random)
        order = torch.randperm(inputs, device="cuda", generator=random)
        return dataclasses.replace(made, perm=order) if permuted else made

    # Of 1,280 columns the last block has some; at 2,400 tokens an H100 shares 50 of 182 tiles.
    gate_up = backend.gate_up_linear(matrix(2048, 2 * 1280), None)
    down = backend.quant_linear(matrix(1280, 2048), None)
    qkv = backend.quant_linear(matrix(2048, 600), None)
    hopper = torch.cuda.get_device_capability()[0] == 9
    weight = torch.rand(2048, device="cuda").to(dtype)
    for tokens in (1, 20, 70, 300, 1000, 1100, 2400):
        x = torch.randn(tokens, 2048, device="cuda").to(dtype)
        if hopper and tokens > 1024:
            assert (down.arranged_rows(tokens) > 0) == (not permuted)
        normed = backend.rms_norm(x, weight, 1e-6)
        assert torch.equal(backend.norm_linear(x, weight, 1e-6, qkv), qkv(normed))
        want = down(gate_up(normed), x.clone())
        assert torch.equal(backend.add_mlp(x.clone(), weight, 1e-6, gate_up, down), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[1], [100], [1500], [1100, 30]])
def test_attention_in_the_order_of_its_reader(lengths, kind, random):
    backend = CudaBackend("cuda")
    o_proj = backend.quant_linear(random_matrix(4 * 128, 200, scale=0.02, random=random), None)
    batch = make_batch(lengths, lengths)
    layer = empty_layer(kind, pages_of(lengths), 2, 128)
    fill(layer, batch, lengths)
    q = torch.randn(sum(lengths), 4, 128, device="cuda").half()
    want = o_proj(backend.attention(q, layer, batch, 0.1))
    assert torch.equal(o_proj(backend.attention(q, layer, batch, 0.1, reader=o_proj)), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_self_test_passes(head_dim, kind):
    for dtype in (torch.float16, torch.bfloat16):
        backend = CudaBackend("cuda", dtype)
        selftest_ops.check(backend, selftest_ops.Shape(14, 2, head_dim, 896, kind))


class Broken(CudaBackend):
    """Kernels that are wrong in one place."""

    fault = ""

    def silu_mul(self, gate_up):
        out = super().silu_mul(gate_up)
        if self.fault == "silu_mul":
            out[0, -1] += 40
        return out

    def attention(self, q, layer, batch, scale, reader=None):
        out = super().attention(q, layer, batch, scale, reader)
        if self.fault == "attention" or (self.fault == "reader" and out.dim() == 3):
            out[-1] = out[0]
        return out

    def add_mlp(self, x, weight, eps, gate_up, down):
        out = super().add_mlp(x, weight, eps, gate_up, down)
        if self.fault == "mlp":
            out[-1] = 0
        return out

    def partial_attention(self, q, layer, batch, scale, *, closed):
        out, lse = super().partial_attention(q, layer, batch, scale, closed=closed)
        if self.fault == "partial_attention":
            lse[-1] += 1.0 if closed else -1.0
        return out, lse

    def merge_attention(self, first, second):
        out = super().merge_attention(first, second)
        if self.fault == "merge_attention":
            out[-1] = second[0][-1]
        return out

    def _normed(self, x, weight, eps, linear):
        out = super()._normed(x, weight, eps, linear)
        if self.fault == "rms_norm" and out.dim() == 3:
            out.copy_(out.roll(1, 1))
        return out

    def rope_store(self, q, k, v, cos, sin, layer, batch):
        if self.fault == "rope_store":
            v = v.roll(1, 0)
        return super().rope_store(q, k, v, cos, sin, layer, batch)


@pytest.mark.parametrize("kind", ["float16", "int6", "int4"])
@pytest.mark.parametrize("fault", ["silu_mul", "attention", "rope_store"])
def test_self_test_finds_faults(fault, kind):
    backend = Broken("cuda")
    backend.fault = fault
    with pytest.raises(ConfigError, match=fault):
        selftest_ops.check(backend, selftest_ops.Shape(4, 4, 128, 512, kind))


@pytest.mark.parametrize("fault", ["partial_attention", "merge_attention"])
def test_self_test_finds_faults_of_open_pages(fault):
    backend = Broken("cuda")
    backend.fault = fault
    with pytest.raises(ConfigError, match="open pages"):
        selftest_ops.check(backend, selftest_ops.Shape(4, 4, 128, 512, "int4"))


def test_self_test_of_matrices(random, monkeypatch):
    backend = CudaBackend("cuda")
    matrix = random_matrix(512, 256, random=random)
    selftest.check_linear(backend, matrix)
    wrong = ref.dequantize(dataclasses.replace(matrix, scales=matrix.scales * 1.02))
    monkeypatch.setattr(ref, "dequantize", lambda _: wrong)
    with pytest.raises(ConfigError, match="matrix"):
        selftest.check_linear(backend, matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen-1.8b-int4", "qwen-72b-int4"])
def test_self_test_of_every_product(name, dtype):
    config = shapes.shape(name)
    for bits in (4, 8):
        quant = dataclasses.replace(config.quant, bits=bits)
        changed = dataclasses.replace(config, quant=quant)
        selftest.check_model(CudaBackend("cuda", dtype), changed, "int8")


@pytest.mark.parametrize(
    ("fault", "name"),
    [("rms_norm", "rms_norm before"), ("reader", "attention .* before"), ("mlp", "MLP")],
)
def test_self_test_finds_faults_between_products(fault, name):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("only kernels for Hopper read activations in an order of their own")
    backend, config = Broken("cuda"), shapes.shape("qwen-72b-int4")
    backend.fault = fault
    with pytest.raises(ConfigError, match=name):
        selftest.check_model(backend, config, "int8")


def test_refusals():
    with pytest.raises(ConfigError, match="float32"):
        CudaBackend("cuda", torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_in_a_graph(kind, random):
    """All operations of a block, one after the other, captured and replayed at new positions."""
    backend, reference = CudaBackend("cuda"), RefBackend("cuda")
    heads, dim = 4, 64
    hidden = heads * dim
    weight = torch.rand(hidden, device="cuda").half()
    qkv_matrix = random_matrix(hidden, 3 * hidden, scale=0.02, random=random)
    down_matrix = random_matrix(hidden, hidden, scale=0.02, random=random)
    batch = make_batch([1, 1], [900, 900])
    layers = [empty_layer(kind, pages_of([900, 900]), heads, dim) for _ in range(2)]
    cos, sin = torch.rand(2, 2, dim // 2, device="cuda")

    def block(ops, layer, x, qkv_proj, down):
        h = ops.rms_norm(x, weight.to(x.dtype), 1e-6)
        qkv = qkv_proj(h).view(len(x), -1, dim)
        q, k, v = qkv.split(heads, dim=1)
        q = ops.rope_store(q, k, v, cos, sin, layer, batch)
        out = down(ops.attention(q, layer, batch, 0.125))
        return x + ops.silu_mul(torch.cat((out, x), 1))

    fast = [backend.quant_linear(m, None) for m in (qkv_matrix, down_matrix)]
    slow = [reference.quant_linear(m, None) for m in (qkv_matrix, down_matrix)]
    x = torch.randn(2, hidden, device="cuda").half()
    set_position(batch, 0)
    block(backend, layers[0], x, *fast)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = block(backend, layers[0], x, *fast)
    for position in range(100):
        set_position(batch, position)
        x.normal_()
        graph.replay()
        want = block(reference, layers[1], x.float(), *slow)
        assert relative_error(got, want) < {"int4": 2e-2, "int6": 1e-2}.get(kind, 5e-3)


def set_position(batch, position):
    page_size = 64
    batch.lengths.fill_(position + 1)
    batch.slots.copy_(batch.pages[:, position // page_size] * page_size + position % page_size)


# Twice what fp16 activations change in the reference: this model amplifies every rounding.
LIMITS = {"float16": 0.02, "bfloat16": 0.04, "int8": 0.08, "int6": 0.2, "int4": 0.4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_what_the_cpu_gives(kind, tmp_path):
    """The toy model of the CPU tests, in sizes that the GPU takes, beside fp32 on the CPU."""
    write_llama(tmp_path, hidden_size=256, head_dim=64)
    exact = LLM(tmp_path, device="cpu", dtype="float32", kv_dtype=kind)
    fast = LLM(tmp_path, device="cuda", dtype="float16", kv_dtype=kind)
    ids = torch.randint(0, 300, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    want, got = exact.logits(ids), fast.logits(ids).cpu()
    limit = LIMITS[kind]
    assert relative_error(got, want) < limit
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    answers = [list(llm.generate(ids[:30], params).token_ids) for llm in (exact, fast)]
    agreed = next((i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b), 40)
    if agreed < 40:  # only where two logits nearly tie
        top = exact.logits([*ids[:30], *answers[0][:agreed]])[-1].topk(2).values
        assert (top[0] - top[1]) / want.std() < 4 * limit


def test_an_embedding_in_main_memory():
    backend = CudaBackend("cuda")
    table = torch.randn(50, 264).half()
    ids = torch.tensor([3, 49, 0, 3], device="cuda")
    assert torch.equal(backend.embed(ids, table.pin_memory()).cpu(), table[ids.cpu()])
    assert torch.equal(backend.embed(ids, table.cuda()).cpu(), table[ids.cpu()])
    with pytest.raises(ConfigError, match=r"must be pinned and torch\.float16"):
        backend.embed(ids, table.float().pin_memory())


def test_memory_is_taken_as_planned(tmp_path):
    write_llama(tmp_path, hidden_size=1024, intermediate_size=4096, head_dim=128)
    square = torch.ones(8, 8, device="cuda", dtype=torch.float16)
    square @ square  # cuBLAS takes its workspace, which belongs to `work`, at the first product
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    llm = LLM(tmp_path, device="cuda", dtype="float16", cache_tokens=20_000)
    taken = torch.cuda.memory_allocated() - before
    plan = llm.memory_plan
    assert plan is not None
    assert taken == pytest.approx(plan.weights + plan.cache, rel=0.02)


def test_the_triton_backend_runs_a_model(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    write_llama(tmp_path, hidden_size=256, head_dim=64)
    config = read_model_config(tmp_path)
    logits = []
    for name in ("triton", "ref"):
        backend = choose_backend("cuda", name)[0]
        decoder = load_decoder(Checkpoint.open(tmp_path), config, backend)
        engine = Engine(
            decoder,
            vocab_size=config.vocab_size,
            eos_ids=(),
            max_context=256,
            kv_dtype="float16",
            prefill_chunk=64,
        )
        ids = list(range(5, 105))
        logits.append(engine.logits(ids))
        assert len(list(engine.generate(ids, SamplingParams(temperature=0, max_tokens=5)))) == 5
    assert relative_error(*logits) < LIMITS["float16"]
