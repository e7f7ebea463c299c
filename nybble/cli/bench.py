"""`nybble bench`: how fast this machine is, beside its own floor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import console
from nybble.cli.extras import require
from nybble.cli.folders import make_folder
from nybble.cli.load import Endpoint, Traffic, Work
from nybble.cli.options import AsJson, expand_options
from nybble.errors import ConfigError

if TYPE_CHECKING:
    from nybble.bench.speed import Plan

_CACHES = ("auto", "float16", "int8", "int6", "int4")

commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@dataclass(frozen=True)
class Rows:
    """What `nybble bench speed` measures: every context with every batch, or single rows."""

    contexts: Annotated[str, typer.Option(help="Prompt lengths.")] = "1,6144,14336,30720"
    batches: Annotated[str, typer.Option(help="Sequences side by side.")] = "1"
    kv_dtype: Annotated[
        str, typer.Option(help="Cache: float16, int8, int6, int4; auto: the finest that fits.")
    ] = "auto"
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="One row, CONTEXT:BATCH:CACHE, in place of the three above; may be repeated.",
            show_default=False,
        ),
    ] = None

    def plans(self) -> list[Plan]:
        from nybble.bench.speed import Plan

        if self.kv_dtype not in _CACHES:
            raise ConfigError(f"--kv-dtype is {self.kv_dtype!r}: use {', '.join(_CACHES)}.")
        if self.row:
            return [Plan(*_row(text)) for text in self.row]
        return [
            Plan(context, batch, self.kv_dtype)
            for batch in _numbers("batches", self.batches)
            for context in _numbers("contexts", self.contexts)
        ]


@commands.command(short_help="The card's speed and memory table for this GPU.")
@expand_options
def speed(
    shape: Annotated[
        str, typer.Option(help="A model of random weights: qwen-1.8b-int4 to qwen-72b-int4.")
    ] = "qwen-72b-int4",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated a row.")] = 2048,
    host_embedding: Annotated[
        bool, typer.Option("--host-embedding", help="Leave the embedding in main memory.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder for speed.json, speed.md and speed.png.")
    ] = None,
    as_json: AsJson = False,
    *,
    rows: Rows,
) -> None:
    """The card's speed and memory table for this GPU, each row beside the machine's floor."""
    import json
    from dataclasses import asdict

    from nybble.bench import report
    from nybble.bench.speed import run

    plans = rows.plans()
    _prepare(out)
    measured = run(shape, plans, new_tokens, console.note, host_embedding=host_embedding)
    if out is not None:
        for path in report.write(measured, out):
            console.note(f"Wrote {path}.")
    typer.echo(json.dumps(asdict(measured), indent=2) if as_json else report.markdown(measured))


@commands.command()
@expand_options
def serve(
    url: Annotated[str, typer.Argument(help="An OpenAI endpoint: http://127.0.0.1:8000/v1.")],
    out: Annotated[
        Path | None, typer.Option(help="A folder for serve.json, serve.md and serve.png.")
    ] = None,
    as_json: AsJson = False,
    *,
    traffic: Traffic,
    work: Work,
    endpoint: Endpoint,
) -> None:
    """Put a server under load: throughput, waiting times, errors."""
    require("bench serve", "serve", "httpx2")
    from nybble.cli.load import run

    _prepare(out)
    run(url, endpoint, traffic, work, out, as_json)


@commands.command(short_help="Each kernel's time, beside what the machine could do.")
def kernels(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Also write the rows to this JSON file.")] = None,
) -> None:
    """Each kernel's time, and its share of what memory or arithmetic could do, measured beside it.

    On a GPU in the shapes of Qwen-72B-Chat-Int4, on a CPU in those of the demo.
    """
    import json

    from nybble.kernels.device import find_device

    if out is not None:
        make_folder(out.parent)
    if find_device(device).type == "cuda":
        import torch

        from nybble.kernels.cuda import bench, bench_attention

        rows = [
            *bench.run(bench.BATCHES, torch.float16),
            *bench.run((1, 8, 16, 2048), torch.float16, bits=8),
            *bench_attention.run(bench_attention.CONTEXTS),
        ]
    else:
        from nybble.kernels import bench as cpu_bench

        rows = cpu_bench.run()
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")
        console.note(f"Wrote {out}.")


def _prepare(out: Path | None) -> None:
    """What --out needs, before anything is measured."""
    if out is not None:
        require("--out", "eval", "matplotlib")
        make_folder(out)


def _row(text: str) -> tuple[int, int, str]:
    parts = text.split(":")
    if len(parts) != 3 or parts[2] not in _CACHES:
        raise ConfigError(f"--row is {text!r}: give context, batch and cache, as in 6144:1:int8.")
    context, batch = (_numbers("row", part) for part in parts[:2])
    if len(context) > 1 or len(batch) > 1:
        raise ConfigError(f"--row is {text!r}: give one context and one batch, --row once more.")
    return context[0], batch[0], parts[2]


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--{name} is {text!r}: give whole numbers from 1 on, as in 1,6144.")
    return numbers
