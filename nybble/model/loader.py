"""From a checkpoint's tensors to a Decoder: every name and shape checked, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import torch

from nybble.checkpoint import Checkpoint
from nybble.config import ModelConfig, QuantConfig
from nybble.errors import CheckpointError
from nybble.kernels.backend import Backend, LinearFn
from nybble.kernels.matrix import QuantMatrix
from nybble.model.decoder import Decoder, Layer
from nybble.model.names import NAMES
from nybble.quant import gptq

Progress = Callable[[int, int], None]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Buffers that older software saved and that hold no weights.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attn\.logn_tensor$")


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    *,
    host_embedding: bool = False,
) -> Decoder:
    """Build the decoder on `backend`. dtype: of unquantised matrices, None keeps the file's.

    host_embedding: the table of the tokens stays in main memory, where a GPU reads its rows.

    Raises CheckpointError, naming file and tensor, for anything missing, extra or misshapen;
    that is checked for all tensors before the first weight is read.
    """
    loader = Loader(checkpoint, config, backend, dtype, host_embedding)
    loader.check_names()
    layers = []
    with closing(checkpoint.read_ahead(loader.groups())) as ready:
        for index in range(config.num_layers):
            next(ready)
            layers.append(loader.layer(index))
            if progress is not None:
                progress(index + 1, config.num_layers)
        next(ready)
        return loader.decoder(tuple(layers))


@dataclass(frozen=True)
class Part:
    """One linear of the checkpoint, which may be a slice of a fused matrix."""

    name: str
    inputs: int
    outputs: int
    biased: bool


@dataclass
class Loader:
    """Reads one checkpoint, a layer at a time (the quantiser streams layers through it)."""

    checkpoint: Checkpoint
    config: ModelConfig
    backend: Backend
    dtype: torch.dtype | None = None
    host_embedding: bool = False
    _expected: set[str] = field(default_factory=set)

    # -- what must be there ---------------------------------------------------------------

    def check_names(self) -> None:
        """Every tensor present with the right shape, and none that would silently be ignored."""
        names = NAMES[self.config.family]
        vocab = (self.config.vocab_size, self.config.hidden_size)
        self._check(names.embed_tokens + ".weight", vocab)
        self._check(names.norm + ".weight", (self.config.hidden_size,))
        if not self.config.tied:
            self._check(names.lm_head + ".weight", vocab)
        self._expected.add(names.lm_head + ".weight")
        for index in range(self.config.num_layers):
            for field_name, name in self._norm_names(index):
                self._check(name, self._norm_shape(field_name))
            for parts in self.linears(index).values():
                for part in parts:
                    self._check_part(part)
        extra = [n for n in self.checkpoint.names() if n not in self._expected]
        extra = [n for n in extra if not _IGNORED.search(n)]
        if extra:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(extra)} tensors do not belong to a "
                f"{self.config.family} model as config.json describes it, the first is "
                f"{sorted(extra)[0]}; use the config.json that came with these weights."
            )

    def _check(self, name: str, shape: tuple[int, ...], required: bool = True) -> None:
        self._expected.add(name)
        if required or name in self.checkpoint:
            self.checkpoint.expect(name, shape, _FLOATS)

    def _check_part(self, part: Part) -> None:
        quantised = f"{part.name}.qweight" in self.checkpoint
        if quantised and self.config.quant is None:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {part.name} is quantised, but config.json has no "
                "quantization_config; copy the config.json that came with these weights."
            )
        self._check(f"{part.name}.bias", (part.outputs,), required=part.biased)
        if not quantised or self.config.quant is None:
            self._check(f"{part.name}.weight", (part.outputs, part.inputs))
            return
        per_word = 32 // self.config.quant.bits
        if part.inputs % per_word:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {part.name} has {part.inputs} inputs, which words of "
                f"{per_word} codes cannot hold; use the config.json that came with these weights."
            )
        size = self.config.quant.group_size
        groups = 1 if size == -1 else -(-part.inputs // size)
        shapes = {
            "qweight": (part.inputs // per_word, part.outputs),
            "qzeros": (groups, -(-part.outputs // per_word)),
            "scales": (groups, part.outputs),
            "g_idx": (part.inputs,),
        }
        for suffix, shape in shapes.items():
            name = f"{part.name}.{suffix}"
            self._expected.add(name)
            if suffix != "g_idx" or name in self.checkpoint:
                kinds = _FLOATS if suffix == "scales" else (torch.int32,)
                self.checkpoint.expect(name, shape, kinds)

    # -- names -----------------------------------------------------------------------------

    def _norm_names(self, index: int) -> Iterator[tuple[str, str]]:
        names = NAMES[self.config.family]
        for field_name, name in names.norms.items():
            yield field_name, f"{names.layer.format(index)}{name}.weight"

    def _norm_shape(self, field_name: str) -> tuple[int]:
        per_head = field_name in ("q_norm", "k_norm")
        return (self.config.head_dim if per_head else self.config.hidden_size,)

    def linears(self, index: int) -> dict[str, list[Part]]:
        """The parts of each linear of a layer, under the decoder's name of it."""
        c, names = self.config, NAMES[self.config.family]
        width = c.intermediate_size
        qkv = (c.q_size, c.kv_size, c.kv_size)
        # field: inputs, outputs of its parts, whether the family has a bias there
        forms: dict[str, tuple[int, tuple[int, ...], bool]] = {
            "qkv_proj": (c.hidden_size, qkv, c.qkv_bias),
            "o_proj": (c.q_size, (c.hidden_size,), False),
            "gate_up_proj": (c.hidden_size, (width, width), False),
            "down_proj": (width, (c.hidden_size,), False),
        }
        linears = {}
        for field_name, (inputs, outputs, biased) in forms.items():
            sources = names.linears[field_name]
            if len(sources) == 1:
                outputs = (sum(outputs),)
            linears[field_name] = [
                Part(names.layer.format(index) + source, inputs, size, biased)
                for source, size in zip(sources, outputs, strict=True)
            ]
        return linears

    # -- reading ---------------------------------------------------------------------------

    def groups(self) -> list[list[str]]:
        """The names of each layer's tensors, in turn; last those outside of the layers."""
        layer, stored = NAMES[self.config.family].layer, self.checkpoint.names()
        prefixes = [layer.format(index) for index in range(self.config.num_layers)]
        groups = [[name for name in stored if name.startswith(prefix)] for prefix in prefixes]
        inside = {name for group in groups for name in group}
        return [*groups, [name for name in stored if name not in inside]]

    def layer(self, index: int) -> Layer:
        norms = {field: self._norm(name) for field, name in self._norm_names(index)}
        fns = {name: self._linear(name, parts) for name, parts in self.linears(index).items()}
        return Layer(
            input_norm=norms["input_norm"],
            qkv_proj=fns["qkv_proj"],
            q_norm=norms.get("q_norm"),
            k_norm=norms.get("k_norm"),
            o_proj=fns["o_proj"],
            post_norm=norms["post_norm"],
            gate_up_proj=fns["gate_up_proj"],
            down_proj=fns["down_proj"],
        )

    def decoder(self, layers: tuple[Layer, ...]) -> Decoder:
        names = NAMES[self.config.family]
        embedding = self._embedding(names.embed_tokens + ".weight")
        head = embedding if self.config.tied else self._float(names.lm_head + ".weight")
        # Beside 4-bit blocks an 8-bit head adds nothing; a 16-bit model keeps all its digits.
        lm_head = self.backend.head_linear(head, exact=self.config.quant is None)
        return Decoder(
            config=self.config,
            backend=self.backend,
            embed_tokens=embedding,
            layers=layers,
            norm=self._norm(names.norm + ".weight"),
            lm_head=lm_head,
        )

    def _embedding(self, name: str) -> torch.Tensor:
        if self.host_embedding:
            return self.checkpoint.tensor(name).to(self.backend.dtype).pin_memory()
        return self._float(name)

    def _float(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name).to(self.backend.device, self.dtype)

    def _norm(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name).to(self.backend.device, self.backend.dtype)

    def _linear(self, name: str, parts: list[Part]) -> LinearFn:
        """One function for all parts; parts that cannot be fused run side by side."""
        bias = self.bias(parts)
        quant = self.config.quant
        if quant is not None and all(f"{p.name}.qweight" in self.checkpoint for p in parts):
            matrix = gptq.concat([self._matrix(part, quant) for part in parts])
            if matrix is not None:
                paired = name == "gate_up_proj"
                pack = self.backend.gate_up_linear if paired else self.backend.quant_linear
                return pack(matrix, bias)
        elif not any(f"{p.name}.qweight" in self.checkpoint for p in parts):
            weights = [self._float(f"{part.name}.weight") for part in parts]
            weight = torch.cat(weights) if len(weights) > 1 else weights[0]
            return self.backend.dense_linear(weight, bias)
        return _side_by_side([self._linear(part.name, [part]) for part in parts])

    def _matrix(self, part: Part, quant: QuantConfig) -> QuantMatrix:
        def read(suffix: str) -> torch.Tensor:
            return self.checkpoint.tensor(f"{part.name}.{suffix}").to(self.backend.device)

        g_idx = read("g_idx") if f"{part.name}.g_idx" in self.checkpoint else None
        stored = gptq.GptqTensors(part.name, read("qweight"), read("qzeros"), read("scales"), g_idx)
        return gptq.read_matrix(stored, quant)

    def bias(self, parts: list[Part]) -> torch.Tensor | None:
        """The biases joined, or None where all are zero, as the quantisers of 2023 wrote them."""
        biases = []
        for part in parts:
            name = f"{part.name}.bias"
            if name in self.checkpoint:
                biases.append(self._norm(name))
            else:
                biases.append(self._zeros(part.outputs))
        joined = torch.cat(biases)
        return joined if bool(joined.any()) else None

    def _zeros(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=self.backend.dtype, device=self.backend.device)


def _side_by_side(functions: list[LinearFn]) -> LinearFn:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([function(x) for function in functions], dim=-1)

    return run
