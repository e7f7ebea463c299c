"""Rows of a benchmark as Markdown, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nybble.bench.speed import Row, Run

_COLUMNS = (
    ("batch", "{:d}", "batch"),
    ("context", "{:,d}", "context"),
    ("kv", "{}", "KV cache"),
    ("first_token_seconds", "{:.2f}", "first token (s)"),
    ("prefill_rate", "{:,.0f}", "prefill (tokens/s)"),
    ("decode_rate", "{:,.1f}", "decode (tokens/s)"),
    ("overall_rate", "{:,.1f}", "speed (tokens/s)"),
    ("bandwidth", "{:,.0f}", "GB/s"),
    ("of_floor", "{:.0%}", "of the floor"),
    ("peak_memory", "{:.2f}", "peak memory (GB)"),
)


def markdown(run: Run) -> str:
    """The table, as in the model card, under what it was measured on."""
    titles = [title for _, _, title in _COLUMNS]
    lines = [
        f"{run.model} on {run.device}: reads {run.read_ceiling / 1e9:,.0f} GB/s, "
        f"multiplies {run.matmul_ceiling / 1e12:,.0f} TFLOP/s (16 bit), measured in this run. "
        f"Weights {run.weight_bytes / 1e9:.1f} GB; {run.new_tokens:,} new tokens a row; "
        "`speed` is generated tokens over the whole time, as the card counts.",
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---:|" * len(titles),
    ]
    for row in run.rows:
        values = [form.format(getattr(row, field)) for field, form, _ in _COLUMNS]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def write(run: Run, folder: Path) -> list[Path]:
    """speed.json, speed.md and speed.png in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("speed.json", "speed.md", "speed.png")]
    paths[0].write_text(json.dumps(asdict(run), indent=2) + "\n")
    paths[1].write_text(markdown(run) + "\n")
    plot(run, paths[2])
    return paths


def plot(run: Run, path: Path) -> None:
    """Decode speed against context at batch 1, with the floor drawn in."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    single = [row for row in run.rows if row.batch == 1]
    for kind in dict.fromkeys(row.kv for row in single):
        rows = sorted((row for row in single if row.kv == kind), key=lambda row: row.context)
        _curve(axes, rows, f"{kind} cache")
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("decoded tokens a second")
    axes.set_title(f"{run.model} on {run.device}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if single:
        axes.legend()
    figure.savefig(path, dpi=130)


def _curve(axes: Any, rows: Sequence[Row], label: str) -> None:
    contexts = [row.context for row in rows]
    line = axes.plot(contexts, [row.decode_rate for row in rows], "o-", label=label)[0]
    floor = [row.floor_rate for row in rows]
    axes.plot(contexts, floor, "_--", ms=12, color=line.get_color(), label=f"{label}: floor")
