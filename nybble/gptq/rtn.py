"""Round-to-nearest: the plainest way to a GPTQ checkpoint, without calibration data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nybble.checkpoint import Checkpoint, CheckpointWriter, read_json
from nybble.config import QuantConfig
from nybble.errors import ConfigError
from nybble.model import read_model_config
from nybble.model.names import linear_names
from nybble.quant.gptq import write_tensors

Progress = Callable[[int, int], None]


def quantize_folder(
    source: Path, target: Path, config: QuantConfig, progress: Progress | None = None
) -> None:
    """Write `target`, a GPTQ checkpoint of the 16-bit checkpoint `source`.

    Embeddings, norms and the head stay as they are. Raises ConfigError for a source that is
    quantised already, and what reading and writing checkpoints raises.
    """
    model = read_model_config(source)
    if model.quant is not None:
        raise ConfigError(f"{source} is quantised already: give the 16-bit checkpoint.")
    checkpoint = Checkpoint.open(source)
    linears = linear_names(model)
    names = checkpoint.names()
    with CheckpointWriter(target) as writer:
        for done, name in enumerate(names, start=1):
            module, _, kind = name.rpartition(".")
            tensor = checkpoint.tensor(name)
            if module in linears and kind == "weight":
                for suffix, part in quantize_weight(tensor, config).items():
                    writer.add(f"{module}.{suffix}", part)
            else:
                writer.add(name, tensor)
            if progress is not None:
                progress(done, len(names))
        for path in _sidecars(source):
            writer.add_file(path)
        document = read_json(source / "config.json")
        document["quantization_config"] = quantization_config(config)
        writer.add_json("config.json", document)


def _sidecars(folder: Path) -> list[Path]:
    """What a loader needs beside weights and config.json: tokenizer, defaults, licence."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in (".json", ".tiktoken", ".jinja", ".txt", ".md", "")
        and path.name != "config.json"
        and not path.name.endswith(".safetensors.index.json")
        and not path.name.startswith(".")
    )


def quantization_config(config: QuantConfig) -> dict[str, object]:
    """The section of config.json that readers of GPTQ checkpoints expect."""
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act,
        "sym": config.sym,
        "checkpoint_format": config.checkpoint_format,
    }


def quantize_weight(weight: torch.Tensor, config: QuantConfig) -> dict[str, torch.Tensor]:
    """weight (N, K) -> the tensors of one GPTQ linear, each weight at the nearest grid point."""
    inputs = weight.shape[1]
    size = inputs if config.group_size == -1 else config.group_size
    columns = weight.float().t()  # (K, N)
    scales, zeros = [], []
    for group in torch.split(columns, size):
        scale, zero = _grid(group, config)
        scales.append(scale)
        zeros.append(zero)
    g_idx = torch.arange(inputs) // size
    scale, zero = torch.stack(scales).to(torch.float16), torch.stack(zeros)
    levels = columns / scale.float()[g_idx] + zero[g_idx]
    codes = levels.round().clamp(0, 2**config.bits - 1).to(torch.uint8)
    return write_tensors(codes, scale, zero.to(torch.uint8), g_idx, config)


def _grid(group: torch.Tensor, config: QuantConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each column of `group` (rows, N), from its extremes."""
    top = 2**config.bits - 1
    if config.sym:
        scale = group.abs().amax(0) * 2 / top
        return _safe(scale), torch.full_like(scale, 2 ** (config.bits - 1))
    low, high = group.amin(0).clamp(max=0), group.amax(0).clamp(min=0)
    scale = _safe((high - low) / top)
    # A zero of 0 is written as the largest code by v1, which old readers take for 16.
    return scale, (-low / scale).round().clamp(1, top)


def _safe(scale: torch.Tensor) -> torch.Tensor:
    """No scale may vanish in fp16: an all-zero group gets any scale and codes at its zero."""
    smallest = torch.finfo(torch.float16).tiny
    return torch.where(scale < smallest, torch.ones_like(scale) * smallest, scale)
