"""`nybble perplexity` and `nybble compare`: how good a model is, and what quantising cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from nybble.cli import console
from nybble.cli.extras import require
from nybble.cli.folders import make_folder
from nybble.cli.layout import size, table
from nybble.cli.loading import load
from nybble.cli.options import Running
from nybble.errors import ConfigError

if TYPE_CHECKING:
    from nybble.measure import Comparison


def perplexity(model: str, text: Path, window: int, running: Running, as_json: bool) -> None:
    from nybble import measure
    from nybble.gptq.calibrate import read_text

    _check_window(window, running)
    content = read_text(text)
    llm = load(model, running, quiet=as_json)
    with console.ProgressBar() as progress:
        found = measure.perplexity(llm, content, window, lambda *at: progress("Measuring", *at))
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        typer.echo(f"perplexity {found.perplexity:.4f} over {found.tokens:,} tokens")


def compare(
    base: str,
    quant: str,
    text: Path,
    window: int,
    running: Running,
    plot: Path | None,
    as_json: bool,
) -> None:
    from nybble import measure
    from nybble.gptq.calibrate import read_text

    _check_window(window, running)
    content = read_text(text)
    if plot is not None:
        require("--plot", "eval", "matplotlib")
        make_folder(plot.parent)
    first, second = load(base, running, quiet=as_json), load(quant, running, quiet=as_json)
    if plot is not None and not measure.layer_errors(second.folder):
        raise ConfigError(f"{quant} has no report of its layers to plot: leave --plot out.")
    with console.ProgressBar() as progress:
        found = measure.compare(
            first, second, content, window, lambda *at: progress("Measuring", *at)
        )
    typer.echo(json.dumps(found.to_json()) if as_json else _page(found, base, quant))
    if plot is not None:
        _plot(found, plot)


def _check_window(window: int, running: Running) -> None:
    if running.max_context is not None and window > running.max_context:
        raise ConfigError(
            f"--window is {window} and --max-context {running.max_context}: a window is read "
            "whole, so make it the smaller one."
        )


def _page(found: Comparison, base: str, quant: str) -> str:
    return table(
        [
            ("", "base", "quantised"),
            ("Model", base, quant),
            ("Perplexity", f"{found.base.perplexity:.4f}", f"{found.quant.perplexity:.4f}"),
            ("Ratio", "1", _ratio(found)),
            ("Mean KL divergence", "0", f"{found.kl_mean:.5f}"),
            ("99th percentile", "0", f"{found.kl_p99:.4f}"),
            ("Same likeliest token", "100 %", f"{found.top1_agreement:.2%}"),
            ("Size", size(found.base_bytes), size(found.quant_bytes)),
            ("Tokens", f"{found.base.tokens:,}", f"{found.quant.tokens:,}"),
        ]
    )


def _ratio(found: Comparison) -> str:
    error = "" if found.ratio_error is None else f" ± {found.ratio_error:.4f}"
    return f"{found.ratio:.4f}{error}"


def _plot(found: Comparison, path: Path) -> None:
    """A bar for each layer: the mean relative error of its linears."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(found.layer_errors)), [100 * error for error in found.layer_errors])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of its linears (%)")
    axes.set_title(
        f"Perplexity {found.base.perplexity:.3f}, quantised {found.quant.perplexity:.3f}"
    )
    figure.savefig(path, dpi=150, format="png")
