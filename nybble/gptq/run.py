"""From a 16-bit checkpoint to a GPTQ checkpoint, one layer at a time.

Two streams of hidden states run through the model side by side: the original's, and that of the
model quantised so far. Each linear is fitted to what it will really be given, toward what the
original would have put out. Memory: one layer, its Hessians and the two streams.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nybble.checkpoint import Checkpoint
from nybble.checkpoint.writer import check_target
from nybble.config import ModelConfig, QuantConfig
from nybble.errors import ConfigError, NumericsError
from nybble.gptq.blocks import STAGES, Block, States, Statistics, collect
from nybble.gptq.journal import Journal, journal_folder
from nybble.gptq.output import read_report, sidecars, write_folder
from nybble.gptq.report import ModuleResult, Report
from nybble.gptq.solver import Solution, SolverOptions, corrected_target, solve
from nybble.kernels.backend import LinearFn
from nybble.kernels.device import find_device
from nybble.kernels.ref import dequantize
from nybble.kernels.torch_cpu import TorchBackend
from nybble.model import read_model_config
from nybble.model.loader import Loader
from nybble.model.names import NAMES
from nybble.quant.gptq import GptqTensors, read_matrix, write_tensors

# Raised when equal settings would give other bytes, so that old journals are not continued.
_ALGORITHM = 3

Progress = Callable[[ModuleResult, int, int], None]
"""Called after each linear with its result, linears done and linears in all."""


@dataclass(frozen=True)
class RunOptions:
    """How to quantise; what the file will look like is the QuantConfig's matter.

    correct: fit each linear to the original's outputs on the quantised model's inputs, instead
    of to its own weights; costs a second stream of hidden states. device: where the work is
    done. offload: keep the hidden states in main memory when the device is a GPU.
    """

    solver: SolverOptions = field(default_factory=SolverOptions)
    correct: bool = True
    device: str = "cpu"
    offload: bool = False


_DEFAULT = RunOptions()


def quantize_checkpoint(
    source: Path,
    target: Path,
    quant: QuantConfig,
    windows: Sequence[Sequence[int]],
    options: RunOptions = _DEFAULT,
    progress: Progress | None = None,
) -> Report:
    """Write the folder `target`: `source` with every linear of its blocks in `quant`'s format.

    windows: calibration token ids, one sequence each. A run that was killed goes on where it
    stopped when it is called again with the same arguments, and ends with the same bytes.
    Raises ConfigError for what cannot be quantised, CheckpointError for damaged or foreign
    files and for a target that is taken, CapacityError for a full disk, NumericsError, which
    names the linear, for NaN or Inf.
    """
    began = time.monotonic()
    config = _checked_config(source, quant, windows)
    checkpoint = Checkpoint.open(source)
    sidecars(source)  # a bad one is refused now, not after the last layer
    settings = _settings(checkpoint, config, quant, windows, options)
    if not journal_folder(target).exists():
        check_target(target)
    with Journal(target, settings) as journal:
        # A finished target beside a journal: the last run was killed between its last two steps.
        report = read_report(target, settings)
        if report is None:
            check_target(target)
            modules = _Run(checkpoint, config, quant, options, journal, progress).layers(windows)
            report = Report(_name(source), settings, modules, checkpoint.nbytes)
            report = write_folder(checkpoint, config, quant, journal, target, report)
        journal.remove()
    return replace(report, seconds=time.monotonic() - began)


def _name(source: Path) -> str:
    """A folder's own name; in a hub's cache, where that is a revision, the repository's."""
    folder = source.resolve()
    if folder.parent.name != "snapshots":
        return folder.name
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/")


def _checked_config(
    source: Path, quant: QuantConfig, windows: Sequence[Sequence[int]]
) -> ModelConfig:
    config = read_model_config(source)
    if config.quant is not None:
        raise ConfigError(f"{source} is quantised already: give the 16-bit checkpoint.")
    for size in (config.hidden_size, config.q_size, config.intermediate_size):
        if size % (32 // quant.bits):
            raise ConfigError(
                f"{source} has matrices of {size} inputs, which words of {32 // quant.bits} codes "
                "cannot hold: this model cannot be stored as GPTQ."
            )
    if not windows or not all(windows):
        raise ConfigError("There is no calibration text: give at least one token in each window.")
    if not all(0 <= token < config.vocab_size for window in windows for token in window):
        raise ConfigError(
            f"The calibration ids go beyond the vocabulary of {config.vocab_size}: use this "
            "model's own tokenizer."
        )
    return config


def _settings(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quant: QuantConfig,
    windows: Sequence[Sequence[int]],
    options: RunOptions,
) -> dict[str, Any]:
    """What decides the result: kept in the report, and compared before a run is continued."""
    ids = hashlib.sha256(repr([list(window) for window in windows]).encode()).hexdigest()
    return {
        "quant": asdict(quant),
        "solver": asdict(options.solver),
        "correct": options.correct,
        "device": find_device(options.device).type,
        "calibration": {
            "windows": len(windows),
            "tokens": sum(map(len, windows)),
            "sha256": ids,
        },
        "config": hashlib.sha256(repr(config).encode()).hexdigest(),
        "weights": checkpoint.fingerprint(),
        "algorithm": _ALGORITHM,
    }


class _Run:
    """The walk through the layers of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        quant: QuantConfig,
        options: RunOptions,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._quant, self._options = quant, options
        self._journal, self._progress = journal, progress
        device = find_device(options.device)
        # The CPU multiplies fp32 well enough; a GPU needs 16 bits to be fast.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._backend = TorchBackend(device, dtype)
        self._loader = Loader(checkpoint, config, self._backend, dtype)
        self._store = torch.device("cpu") if options.offload else device
        self._results: list[ModuleResult] = []

    def layers(self, windows: Sequence[Sequence[int]]) -> list[ModuleResult]:
        """Quantise what the journal does not hold yet; the results of all linears."""
        self._loader.check_names()
        quantized = self._embedded(windows)
        original = list(quantized) if self._options.correct else []
        indices = range(self._config.num_layers)
        last = max((index for index in indices if index not in self._journal), default=-1)
        for index in indices:
            layer = self._loader.layer(index)
            before = Block(self._config, self._backend, layer)
            after = Block(self._config, self._backend, layer)
            if index in self._journal:
                self._restore(index, after)
            else:
                self._quantize(index, before, after, original, quantized)
            if index < last:  # later, nobody needs the hidden states
                self._advance(before, original)
                self._advance(after, quantized)
            self._release(index)
        return self._results

    def _release(self, index: int) -> None:
        """Unmap what was read of a layer, or the process seems to grow with every one."""
        prefix = NAMES[self._config.family].layer.format(index)
        for name in self._checkpoint.names():
            if name.startswith(prefix):
                self._checkpoint.release(name)

    def _embedded(self, windows: Sequence[Sequence[int]]) -> States:
        decoder = self._loader.decoder(())
        ids = [torch.tensor(list(window), device=self._backend.device) for window in windows]
        return [decoder.embed(window).to(self._store) for window in ids]

    def _advance(self, block: Block, states: States) -> None:
        for index, state in enumerate(states):
            states[index] = block.forward(state.to(self._backend.device)).to(self._store)

    def _quantize(
        self, index: int, before: Block, after: Block, original: States, quantized: States
    ) -> None:
        tensors: dict[str, torch.Tensor] = {}
        results = []
        for stage in STAGES:
            began = time.monotonic()
            statistics = collect(stage, after, quantized, before if original else None, original)
            parts = self._weights(index, stage)
            try:
                solution = self._solve(list(parts.values()), statistics)
            except NumericsError as error:
                raise NumericsError(f"Layer {index}, {', '.join(parts)}: {error}") from error
            found = self._tensors(parts, solution)
            after.set_linear(stage, self._linear(index, stage, found))
            tensors |= found
            seconds = time.monotonic() - began
            results.append(ModuleResult(index, stage, solution.error, seconds))
            self._report(results[-1])
        self._journal.save(index, tensors, [asdict(result) for result in results])

    def _restore(self, index: int, block: Block) -> None:
        tensors, notes = self._journal.load(index)
        for stage in STAGES:
            block.set_linear(stage, self._linear(index, stage, tensors))
        for note in notes:
            self._report(ModuleResult(**note))

    def _weights(self, index: int, stage: str) -> dict[str, torch.Tensor]:
        """The weights (N, K) of a stage by module name; they share their inputs."""
        modules = [part.name for part in self._loader.linears(index)[stage]]
        return {module: self._checkpoint.tensor(f"{module}.weight") for module in modules}

    def _solve(self, weights: list[torch.Tensor], statistics: Statistics) -> Solution:
        joined = torch.cat([w.to(self._backend.device).float() for w in weights])
        weight = joined.t().contiguous()  # (K, N)
        shift = statistics.shift(weight)
        if shift is not None:
            weight = corrected_target(weight, statistics.hessian, shift, self._options.solver)
        return solve(weight, statistics.hessian, self._quant, self._options.solver)

    def _tensors(
        self, parts: dict[str, torch.Tensor], solution: Solution
    ) -> dict[str, torch.Tensor]:
        """What the file holds of a stage: each part gets its own columns of the solution."""
        tensors: dict[str, torch.Tensor] = {}
        start = 0
        for module, weight in parts.items():
            columns = slice(start, start + len(weight))
            start = columns.stop
            written = write_tensors(
                solution.codes[:, columns],
                solution.scales[:, columns],
                solution.zeros[:, columns],
                solution.g_idx,
                self._quant,
            )
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in written.items()}
        return tensors

    def _linear(self, index: int, stage: str, tensors: dict[str, torch.Tensor]) -> LinearFn:
        """The quantised stage as later layers will meet it, from the tensors of the file."""
        parts = self._loader.linears(index)[stage]
        weights = torch.cat([self._weight(part.name, tensors) for part in parts])
        return self._backend.dense_linear(weights, self._loader.bias(parts))

    def _weight(self, module: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        stored = {
            suffix: tensors[f"{module}.{suffix}"].to(self._backend.device)
            for suffix in ("qweight", "qzeros", "scales", "g_idx")
        }
        matrix = read_matrix(GptqTensors(where=module, **stored), self._quant)
        rows = dequantize(matrix)
        if matrix.perm is not None:
            real = matrix.perm < matrix.in_features
            rows = torch.zeros_like(rows[: matrix.in_features]).index_copy_(
                0, matrix.perm[real], rows[real]
            )
        return rows.t().to(self._backend.dtype).contiguous()

    def _report(self, result: ModuleResult) -> None:
        self._results.append(result)
        if self._progress is not None:
            total = self._config.num_layers * len(STAGES)
            self._progress(result, len(self._results), total)
