"""`nybble bench`: how fast this machine is, beside its own floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import console
from nybble.cli.load import Endpoint, Traffic, Work
from nybble.cli.options import expand_options
from nybble.errors import ConfigError

commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@commands.command()
def speed(
    shape: Annotated[
        str, typer.Option(help="A model of random weights: qwen-1.8b-int4 to qwen-72b-int4.")
    ] = "qwen-72b-int4",
    contexts: Annotated[str, typer.Option(help="Prompt lengths.")] = "1,6144,14336,30720",
    batches: Annotated[str, typer.Option(help="Sequences side by side.")] = "1",
    kv_dtype: Annotated[
        str, typer.Option(help="Cache: float16, int8, int6, int4; auto: the finest that fits.")
    ] = "auto",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated a row.")] = 2048,
    out: Annotated[
        Path | None, typer.Option(help="A folder for speed.json, speed.md and speed.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The card's speed and memory table for this GPU, each row beside the machine's floor."""
    import json
    from dataclasses import asdict

    from nybble.bench import report
    from nybble.bench.speed import Plan, run

    plans = [
        Plan(context, batch, kv_dtype)
        for batch in _numbers("batches", batches)
        for context in _numbers("contexts", contexts)
    ]
    measured = run(shape, plans, new_tokens, console.note)
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    traffic: Traffic,
    work: Work,
    endpoint: Endpoint,
) -> None:
    """Put a server under load: throughput, waiting times, errors."""
    from nybble.cli.load import run

    run(url, endpoint, traffic, work, out, as_json)


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--{name} is {text!r}: give whole numbers from 1 on, as in 1,6144.")
    return numbers
