"""One decoder block at a time: what its linears are given, and what it makes of hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from nybble.cache.sizes import PAGE_SIZE
from nybble.cache.store import KVStore, one_sequence
from nybble.config import ModelConfig
from nybble.kernels.backend import KV_DTYPES, Backend, LinearFn
from nybble.model.decoder import Decoder, Layer, Step
from nybble.model.rope import make_positions, ntk_alpha

STAGES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""The linears of a block in the order of the computation; each sees what those before it gave."""

States = list[torch.Tensor]
"""Hidden states (tokens, hidden) of each calibration window, between two blocks."""


class _Reached(Exception):  # noqa: N818, no error: it is how `inputs` leaves a block half-way
    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs


@dataclass
class Block:
    """One layer, run on whole sequences: hidden states (tokens, hidden) -> the same."""

    config: ModelConfig
    backend: Backend
    layer: Layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._run(self.layer, hidden)

    def inputs(self, stage: str, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the linear `stage` is given, (tokens, K), and the stream its output is added to.

        The second is None for the linears whose output is not added to the residual stream.
        """
        stream = hidden

        def add(outputs: torch.Tensor) -> None:
            nonlocal stream
            stream = hidden + outputs

        layer = replace(self.layer, o_proj=_watched(self.layer.o_proj, add))
        try:
            self._run(_with_linear(layer, stage, _stop), hidden)
        except _Reached as reached:
            return reached.inputs, stream if stage in ("o_proj", "down_proj") else None
        raise AssertionError(f"the block never called {stage}")

    def set_linear(self, stage: str, linear: LinearFn) -> None:
        self.layer = _with_linear(self.layer, stage, linear)

    @torch.inference_mode()
    def _run(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        tokens, config, device = len(hidden), self.config, hidden.device
        nothing = torch.empty(0, device=device)
        decoder = Decoder(config, self.backend, nothing, (layer,), nothing, _stop)
        kind = next(name for name, held in KV_DTYPES.items() if held is hidden.dtype)
        pages = -(-tokens // PAGE_SIZE)
        store = KVStore(replace(config, num_layers=1), kind, pages, device)
        batch = one_sequence(0, tokens, PAGE_SIZE, device)
        alpha = ntk_alpha(tokens, config.trained_context) if config.dynamic_ntk else 1.0
        positions = make_positions(config, alpha, tokens, device)
        return decoder.block(0, hidden, Step(positions, batch, store.layers))


def _with_linear(layer: Layer, stage: str, linear: LinearFn) -> Layer:
    changes: dict[str, LinearFn] = {stage: linear}
    return replace(layer, **changes)  # type: ignore[arg-type]  # STAGES names linears only


def _stop(inputs: torch.Tensor) -> NoReturn:
    raise _Reached(inputs)


def _watched(linear: LinearFn, report: Callable[[torch.Tensor], None]) -> LinearFn:
    def watched(inputs: torch.Tensor) -> torch.Tensor:
        outputs = linear(inputs)
        report(outputs)
        return outputs

    return watched


@dataclass
class Statistics:
    """Means over the calibration tokens, in fp32: all that the solver needs of them.

    x and r are a linear's input and the residual stream in the original model, q and s the same
    after quantised linears. hessian (K, K) = q'q; drift (K, K) = q'(x - q); residual (K, hidden)
    = q'(r - s), None for linears that do not feed the stream. Drift and residual are None where
    no correction is wanted.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def shift(self, weight: torch.Tensor) -> torch.Tensor | None:
        """q'((x - q) W + r - s): what `corrected_target` wants. weight (K, N)."""
        if self.drift is None:
            return None
        shift = self.drift @ weight
        return shift if self.residual is None else shift + self.residual


@torch.inference_mode()
def collect(
    stage: str,
    quantized: Block,
    quantized_states: Sequence[torch.Tensor],
    original: Block | None = None,
    original_states: Sequence[torch.Tensor] = (),
) -> Statistics:
    """Run both models up to `stage` on every window; without `original`, the Hessian alone."""
    device = quantized.backend.device
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def add(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros(left.shape[1], right.shape[1], device=device)
        sums[name].addmm_(left.t(), right)

    with _tensor_cores():
        for index, state in enumerate(quantized_states):
            inputs, stream = quantized.inputs(stage, state.to(device))
            inputs = inputs.float()
            tokens += len(inputs)
            add("hessian", inputs, inputs)
            if original is not None:
                wanted, goal = original.inputs(stage, original_states[index].to(device))
                add("drift", inputs, wanted.float() - inputs)
                if goal is not None and stream is not None:
                    add("residual", inputs, goal.float() - stream.float())
    return Statistics(**{name: total.div_(tokens) for name, total in sums.items()})


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Let fp32 products of bf16 values use TF32, which holds every bf16 number exactly."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
