"""`nybble generate --input --output`: a file of prompts to a file of answers."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import console
from nybble.cli.loading import load, pull_folder
from nybble.cli.options import Running, Sampling
from nybble.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from nybble.batch.rows import Row
    from nybble.batch.run import State, Summary


@dataclass(frozen=True)
class Files:
    """Both or none; checked before anything is read."""

    input: Annotated[
        Path | None, typer.Option(help="Prompts or chats to answer, one JSON object a line.")
    ] = None
    output: Annotated[
        Path | None, typer.Option(help="Where their answers go. Run again, it goes on.")
    ] = None

    @property
    def given(self) -> bool:
        return self.input is not None or self.output is not None

    def checked(self, *, alone: bool) -> tuple[Path, Path]:
        """ConfigError unless both are there, without (`alone`) what belongs to one prompt."""
        if self.input is None or self.output is None:
            raise ConfigError("--input and --output go together: give both.")
        if not alone:
            raise ConfigError("--input has the prompts: leave out PROMPT, --ids and --json.")
        if self.input.resolve() == self.output.resolve():
            raise ConfigError("--input and --output are one file: give the answers another name.")
        return self.input, self.output


def run(
    model: str, source: Path, target: Path, sampling: Sampling, running: Running, quiet: bool
) -> None:
    """Answer all rows. What can be refused is, before the model is loaded."""
    from nybble.batch.answers import Answers
    from nybble.batch.rows import read_rows
    from nybble.batch.run import Batch

    rows = read_rows(source)
    folder = pull_folder(model)
    with Answers(target, _about(model, folder, rows, sampling)) as answers:
        if answers and not quiet:
            console.note(f"{len(answers):,} of {len(rows):,} rows are answered already.")
        llm = load(model, running, quiet)
        try:
            with console.ProgressBar() as bar:
                params = sampling.params(llm.default_params)
                summary = Batch(llm, answers, params, _Shown(bar, quiet)).run(rows)
        except KeyboardInterrupt:
            console.note(f"{len(answers):,} of {len(rows):,} rows are kept: run it again to go on.")
            raise
    if not quiet:
        console.note(_done(summary, target))
    if summary.failed:
        raise RequestError(
            f"{summary.failed:,} of {summary.rows:,} rows could not be answered: the `error` of "
            f"each in {target} says why."
        )


class _Shown:
    """A bar on a terminal, else a line now and then, for whoever reads the log of a long run."""

    _EVERY = 60.0

    def __init__(self, bar: console.ProgressBar, quiet: bool) -> None:
        self._bar = bar
        self._lines = not quiet and not sys.stderr.isatty()
        self._next = time.monotonic() + self._EVERY

    def __call__(self, now: State) -> None:
        self._bar("Rows", now.done, now.total, f"({now.rate:.0f} tokens/s)")
        if self._lines and now.seconds_left is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._EVERY
            console.note(
                f"{now.done:,} of {now.total:,} rows, {now.rate:.0f} tokens/s, about "
                f"{timedelta(seconds=round(now.seconds_left))} left"
            )


def _about(model: str, folder: Path, rows: Sequence[Row], sampling: Sampling) -> dict[str, Any]:
    """What makes a run the same run, under the names that a refusal shows."""
    from nybble.checkpoint import Checkpoint

    content = json.dumps([asdict(row) for row in rows]).encode()
    return {
        "model": model,
        "weights": Checkpoint.open(folder).fingerprint(),
        "input": hashlib.blake2b(content, digest_size=16).hexdigest(),
        "sampling": asdict(sampling),
    }


def _done(summary: Summary, target: Path) -> str:
    rate = summary.new_tokens / summary.seconds
    return (
        f"Wrote {summary.rows:,} rows to {target}: {summary.new_tokens:,} tokens in "
        f"{summary.seconds:.1f} s, {rate:.1f}/s"
    )
