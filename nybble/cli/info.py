"""`nybble info`: what a model is and what it needs, from config.json and the headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from nybble.checkpoint import Checkpoint
from nybble.cli import machine
from nybble.cli.layout import count, size, table
from nybble.config import ModelConfig
from nybble.memory import (
    KV_KINDS,
    STEP_TOKENS,
    Weights,
    fitting_context,
    kv_bytes_per_token,
    weigh,
    work_bytes,
)
from nybble.model import read_model_config
from nybble.resolve import find
from nybble.tokenizer import has_tokenizer


def run(model: str, as_json: bool) -> None:
    facts = collect(find(model), [machine.ram(), *machine.gpus()])
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _page(facts))


def collect(folder: Path, memories: list[machine.Memory]) -> dict[str, Any]:
    """Everything `info` tells, in the form that --json prints."""
    config = read_model_config(folder)
    checkpoint = Checkpoint.open(folder)
    weights = weigh(config, {name: checkpoint.info(name) for name in checkpoint.names()})
    return {
        "folder": str(folder.absolute()),
        "family": config.family,
        "architecture": _architecture(config),
        "quantisation": _quantisation(config, checkpoint),
        "parameters": weights.parameters,
        "disk_bytes": weights.disk_bytes,
        "disk_bytes_by_kind": dict(weights.disk),
        "memory_bytes": weights.memory,
        "kv_bytes_per_token": {kind: kv_bytes_per_token(config, kind) for kind in KV_KINDS},
        "fits": [_fit(config, weights, memory) for memory in memories],
        "tokenizer": has_tokenizer(folder),
    }


def _architecture(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "tied_embeddings": config.tied,
        "context": config.max_context,
        "rope": config.rope.kind,
        "rope_theta": config.rope.theta,
        "dynamic_ntk": config.dynamic_ntk,
        "logn": config.logn,
    }


def _quantisation(config: ModelConfig, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The dialect as config.json labels it; what only the values tell is decided at load."""
    quant = config.quant
    if quant is None:
        return None
    return {
        "bits": quant.bits,
        "group_size": quant.group_size,
        "symmetric": quant.sym,
        "act_order": quant.desc_act,
        "format_label": quant.checkpoint_format,
        "matrices": sum(name.endswith(".qweight") for name in checkpoint.names()),
        "group_indices": any(name.endswith(".g_idx") for name in checkpoint.names()),
    }


def _fit(config: ModelConfig, weights: Weights, memory: machine.Memory) -> dict[str, Any]:
    def left(kind: str) -> int:
        on_gpu = memory.name != "RAM"
        work = work_bytes(config, STEP_TOKENS["cuda"], KV_KINDS[kind]) if on_gpu else 0
        return memory.free - weights.memory - work

    return {
        "memory": memory.name,
        "free_bytes": memory.free,
        "total_bytes": memory.total,
        "weights_fit": left("fp16") >= 0,
        "context": {kind: fitting_context(config, kind, left(kind)) for kind in KV_KINDS},
    }


# -- the page for people ------------------------------------------------------------------------


def _page(facts: dict[str, Any]) -> str:
    rows = [
        ("Folder", facts["folder"]),
        ("Family", facts["family"]),
        ("Parameters", count(facts["parameters"])),
        *_architecture_rows(facts["architecture"]),
        ("Quantisation", _quantisation_line(facts["quantisation"])),
        ("Tokenizer", "present" if facts["tokenizer"] else "missing: token ids only"),
        ("On disk", size(facts["disk_bytes"])),
        *((f"  {kind}", size(n)) for kind, n in _largest_first(facts["disk_bytes_by_kind"])),
        ("In memory", f"{size(facts['memory_bytes'])} for the weights"),
    ]
    return f"{table(rows)}\n\n{_context_table(facts)}"


def _largest_first(sizes: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])


def _architecture_rows(a: dict[str, Any]) -> list[tuple[str, str]]:
    heads = f"{a['heads']} of {a['head_dim']}"
    if a["kv_heads"] != a["heads"]:
        heads += f", {a['kv_heads']} for keys and values"
    vocabulary = f"{a['vocabulary']:,}" + (", tied to the head" if a["tied_embeddings"] else "")
    extras = [name for name, on in (("dynamic NTK", a["dynamic_ntk"]), ("LogN", a["logn"])) if on]
    rope = f"{a['rope']}, theta {a['rope_theta']:g}"
    return [
        ("Layers", f"{a['layers']}, hidden size {a['hidden_size']}, MLP {a['intermediate_size']}"),
        ("Heads", heads),
        ("Vocabulary", vocabulary),
        ("Context", f"{a['context']:,} tokens"),
        ("RoPE", ", ".join([rope, *extras])),
    ]


def _quantisation_line(quant: dict[str, Any] | None) -> str:
    if quant is None:
        return "none"
    group = (
        "one group a column" if quant["group_size"] == -1 else f"groups of {quant['group_size']}"
    )
    version = "v2" if quant["format_label"] == "gptq_v2" else "v1"
    parts = [f"GPTQ, {quant['bits']} bits", group]
    parts.append("symmetric" if quant["symmetric"] else "asymmetric")
    parts.append("act-order" if quant["act_order"] else "no act-order")
    # Symmetric files tell by their values which they are, and labels have been seen to lie.
    parts.append(f"labelled {version}" + (" (the values decide)" if quant["symmetric"] else ""))
    return ", ".join(parts)


def _context_table(facts: dict[str, Any]) -> str:
    """KV bytes a token, and the context that fits beside the weights in each memory."""
    head = ["KV cache", "a token", *(_memory_title(fit) for fit in facts["fits"])]
    rows = [head]
    for kind, nbytes in facts["kv_bytes_per_token"].items():
        fits = (_context_cell(fit, kind) for fit in facts["fits"])
        rows.append([kind, size(nbytes), *fits])
    return table(rows)


def _memory_title(fit: dict[str, Any]) -> str:
    return f"{fit['memory']}, {size(fit['free_bytes'])} free"


def _context_cell(fit: dict[str, Any], kind: str) -> str:
    return f"{fit['context'][kind]:,} tokens" if fit["weights_fit"] else "the weights do not fit"
