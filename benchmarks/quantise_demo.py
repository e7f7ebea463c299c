"""What each setting of the quantiser brings: ratio of perplexities, divergence, time and size.

    .venv/bin/python benchmarks/quantise_demo.py --calibration calib.txt --text heldout.txt
    ... --device cuda --every 1 --setting "group_size=32 sym=false" --setting "sweeps=0"

Calibration is the first `samples` x 512 tokens of one text; every second window of 1,024 tokens of
the other is measured, in fp32. Standard errors are those of paired windows. Nothing is kept on the
disk.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from nybble import LLM
from nybble.config import QuantConfig
from nybble.gptq.calibrate import CalibrationOptions, read_text, read_windows
from nybble.gptq.run import RunOptions, quantize_checkpoint
from nybble.gptq.solver import SolverOptions
from nybble.measure import Comparison, compare_windows, mean_ratio, split
from nybble.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Setting:
    """The fields that `--setting` may change, with the values that they have otherwise."""

    bits: int = 4
    group_size: int = 64
    sym: bool = True
    desc_act: bool = False
    act_order: bool = True
    sweeps: int = 2
    correct: bool = True
    damp: float = 0.01
    samples: int = 16

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read "group_size=32 sym=false": what differs from the defaults."""
        defaults = asdict(cls())
        given: dict[str, Any] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name not in defaults:
                raise typer.BadParameter(f"{name} is none of {', '.join(defaults)}.")
            # true, false and numbers are JSON.
            given[name] = type(defaults[name])(json.loads(value))
        return cls(**given)

    @property
    def quant(self) -> QuantConfig:
        return QuantConfig(self.bits, self.group_size, self.desc_act, self.sym)

    def options(self, device: str) -> RunOptions:
        solver = SolverOptions(self.damp, self.act_order, self.sweeps)
        return RunOptions(solver, self.correct, device)


SETTINGS = (
    "",
    "sym=false",
    "group_size=32",
    "group_size=32 sym=false",
    "group_size=128",
    "desc_act=true",
    "act_order=false",
    "sweeps=0",
    "correct=false",
    "sweeps=0 correct=false",
    "samples=32",
    "bits=8",
)
HEADER = (
    "| settings | ratio to the base | to the first row | mean KL | same likeliest token "
    "| quantised in (s) | size (MB) |\n|---|---|---|---|---|---|---|"
)


class Base(LLM):
    """Computes the logits of a window once: every setting is measured against them."""

    @cache  # noqa: B019, one model for the life of the program
    def _remembered(self, ids: tuple[int, ...]) -> torch.Tensor:
        return super().logits(ids)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        return self._remembered(tuple(ids))


def main(
    calibration: Annotated[Path, typer.Option()],
    text: Annotated[Path, typer.Option()],
    model: str = "demo-base",
    setting: Annotated[list[str] | None, typer.Option()] = None,
    device: str = "cpu",
    threads: int = 1,
    every: Annotated[int, typer.Option(help="Measure every n-th window.")] = 2,
) -> None:
    torch.set_num_threads(threads)
    base = Base(model, device=device, dtype="float32")
    windows = split(base, read_text(text), 1024)[::every]
    print(f"{len(windows)} windows of {len(windows[0])} tokens\n\n{HEADER}", flush=True)
    first: Comparison | None = None
    for changes in SETTINGS if setting is None else setting:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "quantised")
            seconds = quantise(base.folder, target, calibration, Setting.parse(changes), device)
            quant = LLM(target, device=device, dtype="float32")
            found = compare_windows(base, quant, windows)
        first = first or found
        print(row(changes or "defaults", found, first, seconds), flush=True)


def quantise(source: Path, target: Path, text: Path, setting: Setting, device: str) -> float:
    """Write `target`; the seconds that it took."""
    begin = time.perf_counter()
    options = CalibrationOptions(samples=setting.samples, length=512)
    windows = read_windows(load_tokenizer(source), text, options)
    quantize_checkpoint(source, target, setting.quant, windows, setting.options(device))
    return time.perf_counter() - begin


def row(label: str, found: Comparison, first: Comparison, seconds: float) -> str:
    pairs = zip(found.window_ratios, first.window_ratios, strict=True)
    change = mean_ratio([ours / theirs for ours, theirs in pairs])
    return (
        f"| {label} | {_shown(found.ratio, found.ratio_error)} | {_shown(*change)} "
        f"| {found.kl_mean:.4f} | {found.top1_agreement:.1%} | {seconds:.0f} "
        f"| {found.quant_bytes / 1e6:.1f} |"
    )


def _shown(ratio: float, error: float | None) -> str:
    return f"{ratio:.4f}" if error is None else f"{ratio:.4f} ± {error:.4f}"


if __name__ == "__main__":
    typer.run(main)
