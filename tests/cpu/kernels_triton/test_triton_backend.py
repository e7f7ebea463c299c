"""The backend for GPUs that the CUDA kernels do not serve, on the CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from nybble.checkpoint import Checkpoint
from nybble.engine import replay
from nybble.errors import ConfigError
from nybble.kernels import choose_backend
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.cuda.triton_backend import TritonBackend
from nybble.kernels.ref import RefBackend
from nybble.model import read_model_config
from nybble.model.loader import load_decoder


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("group_size", [32, 24])  # the second is none of Triton's: the reference
def test_linears_against_the_reference(group_size, tokens):
    random = torch.Generator().manual_seed(tokens)
    matrix = random_matrix(96, 40, group_size=group_size, symmetric=False, random=random)
    x, bias = torch.randn(tokens, 96, generator=random), torch.randn(40, generator=random)
    backend = TritonBackend("cpu", torch.float32)
    want = RefBackend().quant_linear(matrix, bias)(x)
    assert torch.allclose(backend.quant_linear(matrix, bias)(x), want, atol=1e-4)
    assert bool(backend.choose(matrix).refused) == (group_size == 24)
    weight = torch.randn(40, 96, generator=random)
    want = RefBackend().dense_linear(weight, bias)(x)
    assert torch.allclose(backend.dense_linear(weight, bias)(x), want, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_old_gpus_compute_in_fp16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend = TritonBackend.load(torch.device("cuda"), torch.bfloat16)
    assert (backend.name, backend.dtype) == ("triton", dtype)


def test_older_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(ConfigError, match=r"7\.5, this GPU has 7\.0: run with --dtype float32"):
        TritonBackend.load(torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="triton: torch finds no NVIDIA GPU"):
        choose_backend("cuda", prefer="triton")


def test_logn_beyond_the_trained_context_stays_in_16_bits(data):
    """The factor of the queries is fp32, which must not spread to what follows."""
    config = read_model_config(data / "qwen1-ntk-logn")
    checkpoint = Checkpoint.open(data / "qwen1-ntk-logn")
    ids = list(range(5, config.trained_context + 9))
    results = [
        replay.logits(load_decoder(checkpoint, config, backend, dtype), ids, kind, 1.0, 512)
        for backend, dtype, kind in (
            (TritonBackend("cpu", torch.float16), torch.float16, "float16"),
            (RefBackend(), torch.float32, "float32"),
        )
    ]
    assert torch.allclose(*results, atol=0.05)
