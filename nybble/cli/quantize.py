"""`nybble quantize`: a 16-bit checkpoint in, a GPTQ checkpoint out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import console
from nybble.cli.layout import size
from nybble.config import QuantConfig
from nybble.errors import ConfigError

if TYPE_CHECKING:
    from nybble.gptq.report import ModuleResult, Report

_BITS = (4, 8)


@dataclass(frozen=True)
class Format:
    """What the file will look like."""

    bits: Annotated[int, typer.Option(help="4 or 8.")] = 4
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale; -1: all of a column.")
    ] = 128
    sym: Annotated[
        bool, typer.Option("--sym/--asym", help="Zero in the middle, or one zero a group.")
    ] = True
    desc_act: Annotated[
        bool, typer.Option("--desc-act", help="Group inputs by size; slower to run.")
    ] = False

    def config(self) -> QuantConfig:
        if self.bits not in _BITS:
            raise ConfigError(f"--bits is {self.bits}: choose 4 or 8.")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ConfigError(f"--group-size is {self.group_size}: give -1 or a multiple of 8.")
        # Zero points other than the middle are read alike by all only where the file says "v2".
        checkpoint_format = "gptq" if self.sym else "gptq_v2"
        return QuantConfig(self.bits, self.group_size, self.desc_act, self.sym, checkpoint_format)


@dataclass(frozen=True)
class Calibration:
    """Which text the weights are fitted to."""

    calibration: Annotated[
        Path | None,
        typer.Option(help="Text, JSONL or chats; left out: a text that comes with nybble."),
    ] = None
    samples: Annotated[int, typer.Option(help="Windows of the text, at most.")] = 128
    length: Annotated[int, typer.Option(help="Tokens of a window, at most.")] = 2048
    seed: Annotated[
        int | None, typer.Option(help="Take random windows; left out: the first ones.")
    ] = None


@dataclass(frozen=True)
class Work:
    """Where and how the work is done."""

    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU if there is one.")] = (
        "cpu"
    )
    offload: Annotated[bool, typer.Option("--offload", help="Keep hidden states off the GPU.")] = (
        False
    )
    correct: Annotated[
        bool, typer.Option(help="Repair in each linear what those before it lost.")
    ] = True
    sweeps: Annotated[int, typer.Option(min=0, help="Rounds of refinement after GPTQ.")] = 2


def run(
    source: str, target: Path, form: Format, calibration: Calibration, work: Work, as_json: bool
) -> None:
    quant = form.config()
    from nybble.gptq.calibrate import CalibrationOptions, read_windows
    from nybble.gptq.run import RunOptions, quantize_checkpoint
    from nybble.gptq.solver import SolverOptions
    from nybble.resolve import resolve
    from nybble.tokenizer import load_tokenizer

    options = CalibrationOptions(calibration.samples, calibration.length, calibration.seed)
    run_options = RunOptions(
        SolverOptions(sweeps=work.sweeps), work.correct, work.device, work.offload
    )
    with console.ProgressBar() as progress:
        folder = resolve(source, progress)
        windows = read_windows(load_tokenizer(folder), calibration.calibration, options)

        def show(result: ModuleResult, done: int, total: int) -> None:
            progress("Quantising", done, total, _describe(result))

        report = quantize_checkpoint(folder, target, quant, windows, run_options, show)
    typer.echo(json.dumps(report.to_json(), indent=2) if as_json else _page(report, target))


def _describe(result: ModuleResult) -> str:
    return f"layer {result.layer} {result.name}, error {result.error:.2%}"


def _page(report: Report, target: Path) -> str:
    sizes = f"{size(report.source_bytes)} became {size(report.target_bytes)}"
    return f"{report.table()}\n\n{target}: {sizes} in {report.seconds:.0f} s"
