"""What the CUDA backend launches for which batch, on a GPU that only takes notes."""

from __future__ import annotations

import ctypes
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from toy import CONFIG

from nybble.cache.store import KVStore, one_sequence
from nybble.config import parse_model_config
from nybble.errors import ConfigError
from nybble.kernels.cuda import attention, dense, linear, rows
from nybble.kernels.cuda.arranged import arranged, rows_of
from nybble.kernels.cuda.attention import PagedAttention
from nybble.kernels.cuda.backend import CudaBackend
from nybble.kernels.cuda.plans import HopperPlan, MmaPlan, plan_for, shares_of
from nybble.kernels.cuda.rows import RowKernels
from nybble.kernels.cuda.samples import random_matrix

CPU = torch.device("cpu")
LONG = (1100, 2001, 6144)


class Gpu:
    """Notes each launch: the kernel's name, the grid and the fields of its argument."""

    def __init__(self) -> None:
        self.notes: list[SimpleNamespace] = []

    def kernel(self, source: str, name: str, *_: object) -> SimpleNamespace:
        def launch(
            grid: tuple[int, int], threads: int, arguments: ctypes.Structure, *, dependent: bool
        ) -> None:
            fields = {field: getattr(arguments, field) for field, _ in arguments._fields_}
            self.notes.append(SimpleNamespace(name=name, grid=grid, **fields))

        return SimpleNamespace(launch=launch)

    @property
    def names(self) -> list[str]:
        return [note.name for note in self.notes]


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    found = Gpu()
    hopper = SimpleNamespace(
        major=9,
        multi_processor_count=132,
        shared_memory_per_multiprocessor=233472,
        shared_memory_per_block_optin=232448,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: hopper)
    for module in (linear, dense, rows, attention):
        monkeypatch.setattr(module, "kernel", found.kernel)
    return found


@pytest.fixture
def backend(gpu) -> CudaBackend:
    made = CudaBackend.__new__(CudaBackend)
    made.device, made.dtype = CPU, torch.float16
    made._rows = RowKernels(CPU, torch.float16)
    made._attention = PagedAttention(CPU, torch.float16)
    return made


def matrix(inputs: int, outputs: int, *, permuted: bool = False):
    made = random_matrix(inputs, outputs, random=torch.Generator().manual_seed(0))
    return dataclasses.replace(made, perm=torch.randperm(inputs)) if permuted else made


def activations(tokens: int, width: int = 512) -> torch.Tensor:
    return torch.zeros(tokens, width, dtype=torch.float16)


@pytest.mark.parametrize("tokens", LONG)
def test_an_mlp_copies_nothing(tokens, gpu, backend):
    gate_up = backend.gate_up_linear(matrix(512, 2048), None)
    down = backend.quant_linear(matrix(1024, 512), None)
    x = activations(tokens)
    assert backend.add_mlp(x, activations(1)[0], 1e-6, gate_up, down).shape == x.shape
    assert gpu.names == ["rms_norm", "gemm_hopper", "gemm_hopper"]
    norm, first, second = gpu.notes
    assert norm.y_rows == first.x_stride == gate_up.arranged_rows(tokens)
    assert first.y_rows == second.x_stride == down.arranged_rows(tokens)
    assert (first.x, second.x) == (norm.y, first.y)
    assert second.y_rows == 0
    assert second.residual == x.data_ptr()


@pytest.mark.parametrize("tokens", LONG)
def test_attention_writes_for_its_reader(tokens, gpu, backend):
    o_proj = backend.quant_linear(matrix(4 * 128, 512), None)
    config = parse_model_config({**CONFIG, "num_attention_heads": 4, "head_dim": 128})
    layer = KVStore(config, "int8", 200, CPU).layers[0]
    q, batch = activations(tokens).view(tokens, 4, 128), one_sequence(0, tokens, 64, CPU)
    o_proj(backend.attention(q, layer, batch, 0.1, reader=o_proj))
    assert gpu.names == ["attention_hopper", "gemm_hopper"]
    o_proj(backend.attention(q, layer, batch, 0.1))
    assert gpu.names[2:] == ["attention_hopper", "arrange", "gemm_hopper"]
    first, product, second = gpu.notes[:3]
    assert first.out_rows == product.x_stride == o_proj.arranged_rows(tokens)
    assert second.out_rows == 0


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 70, 300, *LONG])
def test_inputs_in_another_order_are_gathered_first(tokens, gpu, backend):
    gate_up = backend.gate_up_linear(matrix(512, 2048, permuted=True), None)
    down = backend.quant_linear(matrix(1024, 512, permuted=True), None)
    backend.add_mlp(activations(tokens), activations(1)[0], 1e-6, gate_up, down)
    product = ["gather", "gemm"] if tokens <= 16 else ["gather", "arrange", "gemm_hopper"]
    assert gpu.names == ["rms_norm", *product, *product]
    assert all(getattr(note, "y_rows", 0) == 0 for note in gpu.notes)


@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 64, 65, 128, 129, 300, 1024, *LONG])
@pytest.mark.parametrize("permuted", [False, True])
def test_blocks_are_as_many_as_the_plan_says(permuted, tokens, gpu):
    one = linear.CudaLinear(matrix(2048, 600, permuted=permuted))
    one(activations(tokens, 2048))
    plan, note = plan_for(tokens, one.layout, one.gpu), gpu.notes[-1]
    if isinstance(plan, MmaPlan):
        assert note.grid == plan.grid(tokens, one.matrix.tiles)
        return
    assert isinstance(plan, HopperPlan)
    shares = shares_of(plan, tokens, one.matrix.tiles, one.matrix.rows, one.gpu)
    assert note.grid == (shares.blocks, 1)
    assert (note.whole, note.parts) == (shares.whole, shares.parts)
    assert note.x_stride >= tokens
    assert note.x_stride % plan.tokens == 0


def test_arranged_inputs_of_other_rows_are_refused(gpu):
    one = linear.CudaLinear(matrix(512, 512))
    x = activations(1100)
    one(arranged(1100, 512, one.arranged_rows(1100), x))
    for wrong in (
        arranged(1100, 512, 1100, x),  # rows that the kernel's blocks would overrun
        arranged(1100, 448, one.arranged_rows(1100), x),
        arranged(8, 512, 192, x),  # the kernel for so few takes plain ones
    ):
        with pytest.raises(ConfigError, match="convert the input"):
            one(wrong)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("tokens", [1, 191, 192])
def test_arranged_activations_know_their_rows(tokens, pieces):
    x = arranged(tokens, pieces * 64, 192, activations(1))
    assert x.shape == (pieces, tokens, 64)
    assert rows_of(x) == 192
