"""Checkpoints exchanged with GPTQModel: its files here, and nybble's files there."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from toy import write_llama

from nybble.cli.quantize import Format
from nybble.gptq.run import quantize_checkpoint


@pytest.mark.parametrize("form", ["sym", "asym-act"])
def test_its_files_give_its_logits(make_engine, data, form):
    folder = data / "gptqmodel-toy" / form
    expected = load_file(folder / "expected.safetensors")
    logits = make_engine(folder).logits(expected["ids"].tolist())
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


def test_its_act_order_is_a_real_one(data):
    """Or the test above would not see whether inputs are put in order."""
    tensors = load_file(data / "gptqmodel-toy" / "asym-act" / "model.safetensors")
    g_idx = tensors["model.layers.0.mlp.down_proj.g_idx"]
    assert not torch.equal(g_idx, g_idx.sort().values)


@pytest.fixture
def gptqmodel(monkeypatch):
    """Installed by hand only: it is built from source, which takes minutes."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    return pytest.importorskip("gptqmodel")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_it_reads_files_of_nybble(gptqmodel, make_engine, tmp_path, windows, bits, sym, desc_act):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_llama(source)
    quant = Format(bits=bits, group_size=32, sym=sym, desc_act=desc_act).config()
    quantize_checkpoint(source, target, quant, windows)
    backend = gptqmodel.BACKEND.TORCH
    theirs = gptqmodel.GPTQModel.load(
        str(target), device="cpu", backend=backend, dtype=torch.float16
    )
    with torch.inference_mode():
        logits = theirs.model(torch.tensor([windows[0]])).logits[0].float()
    # Theirs are computed in fp16.
    expected = make_engine(target).logits(windows[0])
    torch.testing.assert_close(logits, expected, atol=0.05 * float(expected.std()), rtol=0)
