"""Quantised folders load as what they stand for; folders that do not fit are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import toy
from safetensors.torch import load_file, save_file

from nybble.config import QuantConfig
from nybble.errors import CheckpointError
from nybble.gptq.output import quantization_config
from nybble.quant.gptq import write_tensors

IDS = list(range(20, 60))


def quantise(weight, config, rng):
    """(tensors of the file, the fp32 weight that they stand for); g_idx shuffled if desc_act."""
    outputs, inputs = weight.shape
    size = inputs if config.group_size == -1 else min(config.group_size, inputs)
    g_idx = np.arange(inputs) // size
    if config.desc_act:
        g_idx = rng.permutation(g_idx)
    groups, middle = -(-inputs // size), 2 ** (config.bits - 1)
    codes = rng.integers(0, 2**config.bits, (inputs, outputs))
    zeros = rng.integers(1, 2**config.bits, (groups, outputs))
    zeros = np.full_like(zeros, middle) if config.sym else zeros
    scales = (rng.random((groups, outputs)) * 0.5 / middle).astype(np.float16)
    meant = scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx])
    tensors = write_tensors(
        torch.from_numpy(codes.astype(np.uint8)),
        torch.from_numpy(scales),
        torch.from_numpy(zeros.astype(np.uint8)),
        torch.from_numpy(g_idx),
        config,
    )
    return tensors, torch.from_numpy(np.ascontiguousarray(meant.T, np.float32))


def write_pair(folder, config, biased=False, **changes):
    """Two folders of the same model: GPTQ, and the fp32 weights it stands for."""
    rng = np.random.default_rng(0)
    shape = {**toy.CONFIG, **changes}
    quantised, meant = {}, {}
    for name, tensor in toy.llama_weights(shape).items():
        if "proj" not in name:
            quantised[name] = meant[name] = tensor
            continue
        module = name.removesuffix(".weight")
        tensors, meant[name] = quantise(tensor, config, rng)
        quantised |= {f"{module}.{suffix}": part for suffix, part in tensors.items()}
        if biased:
            quantised[f"{module}.bias"] = torch.zeros(len(tensor), dtype=torch.float16)
    paths = []
    for kind, tensors, extra in (
        ("int", quantised, {"quantization_config": quantization_config(config)}),
        ("float", meant, {}),
    ):
        path = folder / kind
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({**shape, **extra}))
        paths.append(path)
    return paths


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1, 40])
@pytest.mark.parametrize(("sym", "label"), [(True, "gptq"), (False, "gptq"), (False, "gptq_v2")])
@pytest.mark.parametrize("desc_act", [False, True])
def test_every_dialect_computes_what_it_stands_for(
    tmp_path, make_engine, bits, group_size, sym, label, desc_act
):
    config = QuantConfig(bits, group_size, desc_act, sym, label)
    quantised, meant = write_pair(tmp_path, config)
    torch.testing.assert_close(
        make_engine(quantised).logits(IDS), make_engine(meant).logits(IDS), atol=1e-4, rtol=1e-4
    )


def test_biases_of_zero_are_dropped(tmp_path, make_engine):
    quantised, meant = write_pair(tmp_path, QuantConfig(4, 32, False, True), biased=True)
    torch.testing.assert_close(
        make_engine(quantised).logits(IDS), make_engine(meant).logits(IDS), atol=1e-4, rtol=1e-4
    )


def test_a_linear_left_unquantised_runs_beside_its_siblings(tmp_path, make_engine):
    quantised, meant = write_pair(tmp_path, QuantConfig(4, 32, False, True))
    module = "model.layers.1.self_attn.k_proj"
    tensors = load_file(quantised / "model.safetensors")
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{module}.{suffix}"]
    tensors[f"{module}.weight"] = load_file(meant / "model.safetensors")[f"{module}.weight"]
    save_file(tensors, quantised / "model.safetensors")
    torch.testing.assert_close(
        make_engine(quantised).logits(IDS), make_engine(meant).logits(IDS), atol=1e-4, rtol=1e-4
    )


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM = "model.layers.1.input_layernorm.weight"
K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(NORM), NORM),
        (lambda t: t.update({NORM: torch.ones(63)}), NORM),
        (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)}), NORM),
        (lambda t: t.update({"adapter.weight": torch.ones(1)}), "adapter.weight"),
        (lambda t: t.update({f"{K}.qweight": t[f"{K}.qweight"][:, :8].clone()}), f"{K}.qweight"),
        (lambda t: t.update({f"{K}.scales": t[f"{K}.scales"].int()}), f"{K}.scales"),
        (lambda t: t.pop(f"{K}.qzeros"), f"{K}.qzeros"),
        (lambda t: t.update({f"{K}.g_idx": t[f"{K}.g_idx"] + 9}), f"{K}.g_idx"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, make_engine, change, named):
    quantised, _ = write_pair(tmp_path, QuantConfig(4, 32, False, True))
    edit(quantised, change)
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        make_engine(quantised)


def test_inputs_that_fill_no_whole_words_are_refused(tmp_path, make_engine):
    quantised, _ = write_pair(tmp_path, QuantConfig(4, 32, False, True), intermediate_size=100)
    name = "model.layers.{}.mlp.down_proj.qweight"
    edit(quantised, lambda t: t.update({(n := name.format(i)): t[n][:12].clone() for i in (0, 1)}))
    with pytest.raises(CheckpointError, match=r"0\.mlp\.down_proj has 100 inputs"):
        make_engine(quantised)


def test_quantised_weights_need_their_config(tmp_path, make_engine):
    quantised, meant = write_pair(tmp_path, QuantConfig(4, 32, False, True))
    (quantised / "config.json").write_text((meant / "config.json").read_text())
    with pytest.raises(CheckpointError, match="quantization_config"):
        make_engine(quantised)


def test_buffers_of_old_software_are_ignored(tmp_path, make_engine):
    folder = toy.write_llama(tmp_path)
    before = make_engine(folder).logits(IDS)
    edit(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    assert torch.equal(make_engine(folder).logits(IDS), before)
