"""The folder that a run leaves behind: everything a loader of GPTQ checkpoints needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nybble.checkpoint import Checkpoint, CheckpointWriter, read_json
from nybble.checkpoint.files import inside
from nybble.config import ModelConfig, QuantConfig
from nybble.gptq.journal import Journal
from nybble.gptq.report import ModuleResult, Report, model_card
from nybble.model.names import NAMES, linear_names

REPORT_NAME = "quantization_report.json"
# Tokenizer, chat template, generation defaults, licence, and the code that other loaders run.
_SIDECARS = (".json", ".tiktoken", ".jinja", ".txt", ".md", ".py", "")


def write_folder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig,
    journal: Journal,
    target: Path,
    report: Report,
) -> Report:
    """Write `target` from the journal's layers and the source's other tensors and files.

    Embeddings, norms, biases and the head stay as they are. Returns the report, sizes filled in.
    """
    layers = [NAMES[config.family].layer.format(index) for index in range(config.num_layers)]
    replaced = {f"{module}.weight" for module in linear_names(config)}
    size = 0
    with CheckpointWriter(target) as writer:
        for name in checkpoint.names():
            if name not in replaced:
                tensor = checkpoint.tensor(name)
                writer.add(name, tensor)
                size += tensor.nbytes
        for index in range(len(layers)):
            for name, tensor in journal.load(index)[0].items():
                writer.add(name, tensor)
                size += tensor.nbytes
        for path in sidecars(checkpoint.folder):
            writer.add_file(path)
        document = read_json(checkpoint.folder / "config.json")
        document["quantization_config"] = quantization_config(quant)
        writer.add_json("config.json", document)
        report = replace(report, target_bytes=size)
        writer.add_json(REPORT_NAME, report.lasting())
        writer.add_text("README.md", model_card(report))
    return report


def read_report(target: Path, settings: Mapping[str, Any]) -> Report | None:
    """The report in `target`, if that is the finished folder of a run with these settings."""
    path = target / REPORT_NAME
    if not path.is_file():
        return None
    kept = read_json(path)
    if kept.get("settings") != settings:
        return None
    modules = [ModuleResult(**module) for module in kept["modules"]]
    return Report(**{**kept, "modules": modules})


def sidecars(folder: Path) -> list[Path]:
    """The files that go with the weights. CheckpointError: a link that leaves the folder."""
    return sorted(
        inside(folder, path.name)
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in _SIDECARS
        and path.name not in ("config.json", "README.md", REPORT_NAME)
        and not path.name.endswith(".index.json")  # of shards, whatever their format
        and not path.name.startswith(".")
    )


def quantization_config(quant: QuantConfig) -> dict[str, object]:
    """The section of config.json that readers of GPTQ checkpoints expect."""
    return {
        "quant_method": "gptq",
        "bits": quant.bits,
        "group_size": quant.group_size,
        "desc_act": quant.desc_act,
        "sym": quant.sym,
        "true_sequential": True,
        "lm_head": False,
        "checkpoint_format": quant.checkpoint_format,
    }
