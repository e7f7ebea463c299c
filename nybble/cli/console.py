"""What the command line writes: answers to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# A model's text must not steer the terminal: no control characters but newline and tab.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def error(message: str) -> None:
    _line(f"Error: {message}", "bold red")


def note(message: str) -> None:
    """Something beside the answer: what runs, how fast it was, what was dropped."""
    _line(message, "dim")


def show(message: str) -> None:
    """Something that was asked for, but is no answer: help, the history."""
    _line(message, "")


def _line(message: str, style: str) -> None:
    _stderr().print(
        message.translate(_CONTROLS), style=style, markup=False, emoji=False, soft_wrap=True
    )


def write(text: str) -> None:
    """A piece of an answer, at once and as it is; on a terminal without control characters."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def open_closed_streams() -> None:
    """Whoever closed stdin has nothing to say, and whoever closed the others nothing to read."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def use_utf8() -> None:
    """Take and give UTF-8 whatever the locale says; what cannot be read is found by `checked`."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "replace"),
        (sys.stderr, "replace"),
    ):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors=errors)


class ProgressBar:
    """A bar on stderr for each thing being done, where stderr is a terminal.

    Call it with (what, done, total) and, where there is more to say of the moment, a detail; it
    appears with the first call and leaves nothing behind.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        if not sys.stderr.isatty():
            return
        if self._progress is None:
            self._progress = self._start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        description = f"{what} {detail}".rstrip()
        self._progress.update(
            self._tasks[what], completed=done, total=total, description=description
        )

    @staticmethod
    def _start() -> Progress:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        progress = Progress(*columns, TimeRemainingColumn(), console=_stderr(), transient=True)
        progress.start()
        return progress
