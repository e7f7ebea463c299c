"""From a model's name on the command line to a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nybble.cli import console
from nybble.cli.options import Running
from nybble.errors import ConfigError

if TYPE_CHECKING:
    from nybble.llm import LLM

_SOURCES = ("huggingface", "modelscope")


def load(model: str, running: Running, quiet: bool, *, fill_memory: bool = False) -> LLM:
    """Load a model with a progress bar, then say on stderr what runs. fill_memory: see LLM."""
    from nybble.llm import LLM

    with console.ProgressBar() as progress:
        llm = LLM(model, progress=progress, fill_memory=fill_memory, **vars(running))
    if not quiet:
        console.note(_what_runs(model, llm))
        if llm.memory_plan is not None:
            console.note(f"Memory: {llm.memory_plan}")
    return llm


def _what_runs(model: str, llm: LLM) -> str:
    import torch

    quant = llm.config.quant
    weights = f"{quant.bits}-bit" if quant else "unquantised"
    return (
        f"{model} ({llm.config.family}, {weights}), kernels {llm.backend.name}, "
        f"{torch.get_num_threads()} threads, context {llm.engine.max_context}"
    )


def pull_folder(model: str, revision: str | None = None, source: str = "huggingface") -> Path:
    """The folder of a model, downloaded if it is not here yet. CheckpointError: not all of it is.

    Without a network, a hub's cache gives what it has of a download that was broken off.
    """
    if source not in _SOURCES:
        raise ConfigError(f"--source is {source!r}: choose {' or '.join(_SOURCES)}.")
    from nybble import demo
    from nybble.checkpoint import Checkpoint
    from nybble.paths import local_folder
    from nybble.resolve import resolve

    if revision is not None and (model in demo.NAMES or local_folder(model) is not None):
        raise ConfigError("--revision goes with a hub repository only: leave it out.")
    name = f"modelscope:{model}" if source == "modelscope" else model
    with console.ProgressBar() as progress:
        folder = resolve(name, progress, revision).absolute()
    Checkpoint.open(folder)
    return folder
