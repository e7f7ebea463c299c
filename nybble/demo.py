"""The embedded default: a small real chat model that comes from the package index, no hub needed.

SmolLM2-135M-Instruct (Apache-2.0, Hugging Face). `demo-base` is the 16-bit import of the GGUF
file, `demo` its Int4 form; both are ordinary checkpoint folders in the user's cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nybble.checkpoint import SMOLLM2_135M, fetch_wheel_member, import_gguf
from nybble.checkpoint.files import file_errors
from nybble.config import QuantConfig
from nybble.gptq.calibrate import CalibrationOptions, read_windows
from nybble.gptq.run import RunOptions, quantize_checkpoint
from nybble.gptq.solver import SolverOptions
from nybble.paths import cache_dir
from nybble.tokenizer import load_tokenizer

Progress = Callable[[str, int, int], None]

NAMES = ("demo", "demo-base")
# Raised whenever a folder's content changes, so that old caches are not taken for new ones.
_REVISIONS = {"demo": 5, "demo-base": 1}
_QUANT = QuantConfig(4, 32, desc_act=False, sym=False, checkpoint_format="gptq_v2")
_CALIBRATION = CalibrationOptions(samples=16, length=512)
# What a first run has time for; the rest gains little here (docs/LOG.md, the quantiser).
_OPTIONS = RunOptions(SolverOptions(sweeps=0), correct=False)


def location(name: str) -> Path:
    """Where `demo` or `demo-base` stands, or will stand once it was made."""
    return cache_dir() / "models" / f"{name}-{_REVISIONS[name]}"


def demo_folder(name: str, progress: Progress | None = None) -> Path:
    """The folder of `demo` or `demo-base`, made on first use (93 MB are downloaded)."""
    base, folder = location("demo-base"), location(name)
    with file_errors(folder.parent):
        if not folder.exists() and not base.exists():
            _import(base, progress)
        if not folder.exists():
            _quantize(base, folder, progress)
    return folder


def _import(folder: Path, progress: Progress | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = Path(temporary) / "demo.gguf"
        fetch_wheel_member(SMOLLM2_135M, gguf, _step(progress, "Downloading the demo"))
        import_gguf(gguf, folder, _step(progress, "Importing the demo"))


def _quantize(base: Path, folder: Path, progress: Progress | None) -> None:
    step = _step(progress, "Quantising the demo")
    windows = read_windows(load_tokenizer(base), options=_CALIBRATION)
    with _one_thread():
        quantize_checkpoint(
            base,
            folder,
            _QUANT,
            windows,
            _OPTIONS,
            progress=None if step is None else lambda _, done, total: step(done, total),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain little from two, and lose much where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _step(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
