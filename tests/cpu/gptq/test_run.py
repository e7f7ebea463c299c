"""Whole checkpoints through the quantiser: what comes out, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from nybble.checkpoint import Checkpoint, CheckpointWriter, read_json
from nybble.config import QuantConfig
from nybble.errors import CapacityError, CheckpointError, ConfigError, NumericsError
from nybble.gptq import run
from nybble.gptq.run import RunOptions, quantize_checkpoint
from nybble.gptq.solver import SolverOptions

INT4 = QuantConfig(bits=4, group_size=32, desc_act=False, sym=True)
INT8 = replace(INT4, bits=8)


def published_reader(tensors, module, bits):
    """W (K, N) of one linear by the description of the format, with nothing of nybble."""
    pack, mask = 32 // bits, 2**bits - 1
    shifts = bits * np.arange(pack, dtype=np.uint32)
    words = tensors[f"{module}.qweight"].view(np.uint32)
    codes = (words[:, None, :] >> shifts[:, None] & mask).reshape(-1, words.shape[1])
    zeros = tensors[f"{module}.qzeros"].view(np.uint32)
    zeros = (zeros[:, :, None] >> shifts & mask).reshape(len(zeros), -1).astype(np.int64) + 1
    g_idx = tensors[f"{module}.g_idx"]
    scales = tensors[f"{module}.scales"].astype(np.float32)
    return scales[g_idx] * (codes.astype(np.int64) - zeros[g_idx])


def logits_of(folder, make_engine, ids):
    return make_engine(folder).logits(ids)


def divergence(folder, reference, make_engine, windows):
    """Mean KL divergence from the reference's predictions."""
    total = 0.0
    for window in windows:
        p = logits_of(reference, make_engine, window).log_softmax(-1)
        q = logits_of(folder, make_engine, window).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(windows)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_an_independent_reader_finds_the_weights(llama, tmp_path, windows, bits, sym, desc_act):
    target = tmp_path / "out"
    quant = QuantConfig(bits, 32, desc_act, sym)
    # Without correction, whose aim are the outputs and not the weights.
    report = quantize_checkpoint(llama, target, quant, windows, RunOptions(correct=False))
    found = load_file(target / "model.safetensors")
    original = Checkpoint.open(llama)
    for index in range(3):
        for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            module = f"model.layers.{index}.{name}"
            weight = original.tensor(f"{module}.weight").numpy().T
            distance = np.linalg.norm(published_reader(found, module, bits) - weight)
            assert distance < (0.2 if bits == 4 else 0.015) * np.linalg.norm(weight)
    assert len(report.modules) == 12
    assert all(0 < module.error < (0.05 if bits == 4 else 0.001) for module in report.modules)


@pytest.mark.parametrize("model", ["llama", "qwen"])
@pytest.mark.parametrize("quant", [INT4, INT8, replace(INT4, desc_act=True, sym=False)])
def test_the_result_loads_and_predicts_like_the_original(
    model, quant, request, tmp_path, windows, make_engine
):
    source, target = request.getfixturevalue(model), tmp_path / "out"
    quantize_checkpoint(source, target, quant, windows)
    config = read_json(target / "config.json")["quantization_config"]
    assert (config["bits"], config["desc_act"], config["sym"]) == (
        quant.bits,
        quant.desc_act,
        quant.sym,
    )
    assert divergence(target, source, make_engine, windows) < (0.01 if quant.bits == 4 else 1e-4)


def test_correction_lowers_the_divergence(llama, tmp_path, windows, make_engine):
    plain, corrected = tmp_path / "plain", tmp_path / "corrected"
    generator = torch.Generator().manual_seed(7)
    many = torch.randint(0, 120, (24, 48), generator=generator).tolist()
    quantize_checkpoint(llama, plain, INT4, many, RunOptions(correct=False))
    quantize_checkpoint(llama, corrected, INT4, many)
    assert divergence(corrected, llama, make_engine, many) < 0.9 * divergence(
        plain, llama, make_engine, many
    )


def test_the_hidden_states_may_live_elsewhere(llama, tmp_path, windows, content):
    quantize_checkpoint(llama, tmp_path / "a", INT4, windows)
    quantize_checkpoint(llama, tmp_path / "b", INT4, windows, RunOptions(offload=True))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_everything_else_is_carried_over(qwen, tmp_path, windows):
    (qwen / "qwen.tiktoken").write_text("IQ== 0\n")
    (qwen / "generation_config.json").write_text("{}")
    (qwen / "README.md").write_text("the original's card")
    (qwen / "pytorch_model.bin").write_text("never")
    (qwen / "pytorch_model.bin.index.json").write_text("{}")
    target = tmp_path / "out"
    report = quantize_checkpoint(qwen, target, INT4, windows)
    assert {path.name for path in target.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "quantization_report.json",
        "qwen.tiktoken",
    }
    before, after = Checkpoint.open(qwen), Checkpoint.open(target)
    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.h.1.attn.c_attn.bias"):
        assert torch.equal(before.tensor(name), after.tensor(name))
    card = (target / "README.md").read_text()
    assert "4 bits" in card
    assert "157 tokens" in card
    kept = json.loads((target / "quantization_report.json").read_text())
    assert kept["target_bytes"] == report.target_bytes == after.nbytes
    assert [module["error"] for module in kept["modules"]] == [m.error for m in report.modules]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_links_out_of_the_source_are_refused_before_the_first_layer(llama, tmp_path, windows, name):
    secret = tmp_path / "secret"
    secret.write_bytes((llama / "config.json").read_bytes())
    (llama / name).unlink(missing_ok=True)
    (llama / name).symlink_to(secret)
    seen = []
    with pytest.raises(CheckpointError, match=rf"{name} is a link that leaves"):
        quantize_checkpoint(
            llama, tmp_path / "out", INT4, windows, progress=lambda *step: seen.append(step)
        )
    assert not seen
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_at_the_model_card(llama, tmp_path, windows, monkeypatch):
    new_path = CheckpointWriter._new_path
    monkeypatch.setattr(
        CheckpointWriter,
        "_new_path",
        lambda self, name: Path("/dev/full") if name == "README.md" else new_path(self, name),
    )
    with pytest.raises(CapacityError, match=r"disk is full while writing .*README\.md"):
        quantize_checkpoint(llama, tmp_path / "out", INT4, windows)
    monkeypatch.undo()
    quantize_checkpoint(llama, tmp_path / "out", INT4, windows)


def test_the_bias_of_one_part_alone_is_not_forgotten(llama, tmp_path, windows):
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    tensors = load(llama / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.bias"] = torch.linspace(-1, 1, 96)
    save_file(tensors, llama / "model.safetensors")
    alone = quantize_checkpoint(llama, tmp_path / "alone", INT4, windows)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)
    save_file(tensors, llama / "model.safetensors")
    paired = quantize_checkpoint(llama, tmp_path / "paired", INT4, windows)
    assert [m.error for m in alone.modules] == [m.error for m in paired.modules]


@pytest.mark.parametrize("device", ["cuda", "toaster"])
def test_a_device_that_is_not_there_is_refused(llama, tmp_path, windows, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is"):
        quantize_checkpoint(llama, tmp_path / "out", INT4, windows, RunOptions(device=device))
    assert not list(tmp_path.glob(".*"))


def test_a_target_that_is_not_empty_is_left_alone(llama, tmp_path, windows, content):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out is not empty: choose"):
        quantize_checkpoint(llama, target, INT4, windows)
    assert content(target) == {"thesis.txt": b"mine"}
    assert not list(tmp_path.glob(".*"))


def test_a_quantised_model_is_refused(llama, tmp_path, windows):
    quantize_checkpoint(llama, tmp_path / "once", INT4, windows)
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", INT4, windows)


@pytest.mark.parametrize(("bad", "match"), [([], "no calibration"), ([[]], "no calibration")])
def test_empty_calibration_is_refused(llama, tmp_path, bad, match):
    with pytest.raises(ConfigError, match=match):
        quantize_checkpoint(llama, tmp_path / "out", INT4, bad)


def test_ids_of_another_tokenizer_are_refused(llama, tmp_path):
    with pytest.raises(ConfigError, match="vocabulary of 264"):
        quantize_checkpoint(llama, tmp_path / "out", INT4, [[1, 2, 264]])


def test_nan_is_reported_with_its_place(llama, tmp_path, windows):
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    tensors = load(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(NumericsError, match=r"Layer 1, model\.layers\.1\.mlp\.down_proj: .*weight"):
        quantize_checkpoint(llama, tmp_path / "out", INT4, windows)


def test_activations_that_are_not_finite_are_reported_too(llama, tmp_path, windows):
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    tensors = load(llama / "model.safetensors")
    tensors["model.layers.2.post_attention_layernorm.weight"][5] = float("inf")
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(NumericsError, match=r"Layer 2, .*gate_proj, .*: The calibration inputs"):
        quantize_checkpoint(llama, tmp_path / "out", INT4, windows)


def test_solver_options_reach_the_solver(llama, tmp_path, windows):
    rough = RunOptions(solver=SolverOptions(act_order=False, sweeps=0), correct=False)
    fine = RunOptions(solver=SolverOptions(sweeps=3), correct=False)
    first = quantize_checkpoint(llama, tmp_path / "a", INT4, windows, rough).modules[0].error
    assert quantize_checkpoint(llama, tmp_path / "b", INT4, windows, fine).modules[0].error < first


def test_the_card_names_the_steps_that_were_taken(llama, tmp_path, windows):
    plain = RunOptions(SolverOptions(sweeps=0), correct=False)
    quantize_checkpoint(llama, tmp_path / "plain", INT4, windows, plain)
    quantize_checkpoint(llama, tmp_path / "whole", INT4, windows)
    before, after = ((tmp_path / name / "README.md").read_text() for name in ("plain", "whole"))
    assert "(GPTQ, weighted scales)" in before
    assert "(GPTQ, weighted scales, coordinate descent, correction of earlier errors)" in after


def test_the_card_names_the_repository_of_a_hubs_cache(llama, tmp_path, windows):
    snapshot = tmp_path / "models--Qwen--Qwen1.5-0.5B-Chat/snapshots/4d14e384a4b0"
    shutil.copytree(llama, snapshot)
    quantize_checkpoint(snapshot, tmp_path / "out", INT4, windows)
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("# Qwen/Qwen1.5-0.5B-Chat, 4 bits\n")


def test_the_report_shows_every_module(llama, tmp_path, windows):
    report = quantize_checkpoint(llama, tmp_path / "out", INT4, windows)
    assert report.table().count("%") == 12
    assert json.loads(json.dumps(report.to_json()))["seconds"] == report.seconds > 0
    assert tuple(dict.fromkeys(module.name for module in report.modules)) == run.STAGES
