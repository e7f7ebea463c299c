"""Models of true shape and random weights: speed and memory do not depend on the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from nybble.config import ModelConfig, QuantConfig, RopeConfig
from nybble.errors import ConfigError
from nybble.kernels.backend import Backend, LinearFn
from nybble.kernels.cuda.samples import random_matrix
from nybble.kernels.matrix import QuantMatrix
from nybble.model.decoder import Decoder, Layer

_GROUP_SIZE = 128


def _qwen(layers: int, heads: int, intermediate: int, vocab: int, theta: float) -> ModelConfig:
    """A first-generation Qwen: heads of 128, as many for keys and values."""
    return ModelConfig(
        family="qwen",
        hidden_size=heads * 128,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=vocab,
        norm_eps=1e-6,
        rope=RopeConfig(theta),
        max_context=32768,
        trained_context=32768,
        qkv_bias=True,
        quant=QuantConfig(4, _GROUP_SIZE, desc_act=False, sym=True),
    )


SHAPES: Mapping[str, ModelConfig] = {
    "qwen-1.8b-int4": _qwen(24, 16, 5504, 151936, 10000.0),
    "qwen-7b-int4": _qwen(32, 32, 11008, 151936, 10000.0),
    "qwen-14b-int4": _qwen(40, 40, 13696, 152064, 10000.0),
    "qwen-72b-int4": _qwen(80, 64, 24576, 152064, 1000000.0),
}


@dataclass
class Draw:
    """Random weights whose products keep the size of their inputs, so that nothing overflows."""

    backend: Backend
    random: torch.Generator

    def table(self, rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        out = torch.empty(rows, columns, dtype=torch.float16, device=self.backend.device)
        return out.normal_(generator=self.random).mul_(scale)

    def norm(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=self.backend.dtype, device=self.backend.device)

    def matrix(self, inputs: int, outputs: int) -> QuantMatrix:
        # Uniform codes of 4 bits have a standard deviation of 4.6.
        scale = inputs**-0.5 / 4.6
        matrix = random_matrix(
            inputs, outputs, group_size=_GROUP_SIZE, scale=scale, random=self.random
        )
        # Codes of 0 to 15 less 8 average -0.5. Under scales of either sign the weights average 0;
        # otherwise every product adds to one direction, and layer 36 of the 72B overflows.
        sign = torch.randint(0, 2, matrix.scales.shape, device=matrix.device, generator=self.random)
        return replace(matrix, scales=matrix.scales * (2 * sign - 1))

    def linear(
        self, inputs: int, outputs: int, biased: bool = False, paired: bool = False
    ) -> LinearFn:
        matrix = self.matrix(inputs, outputs)
        bias = self.table(1, outputs)[0] if biased else None
        pack = self.backend.gate_up_linear if paired else self.backend.quant_linear
        return pack(matrix, bias)


def shape(name: str) -> ModelConfig:
    if name not in SHAPES:
        raise ConfigError(f"There is no shape {name!r}: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def random_decoder(
    config: ModelConfig,
    backend: Backend,
    seed: int = 0,
    *,
    host_embedding: bool = False,
    values: type[Draw] = Draw,
) -> Decoder:
    """A decoder of this shape, its weights drawn on the backend's device; peak memory one matrix
    above the model's own. host_embedding: the table of the tokens goes to main memory."""
    draw = values(backend, torch.Generator(backend.device).manual_seed(seed))
    hidden, width = config.hidden_size, config.intermediate_size
    qkv = config.q_size + 2 * config.kv_size

    def layer() -> Layer:
        return Layer(
            input_norm=draw.norm(hidden),
            qkv_proj=draw.linear(hidden, qkv, biased=config.qkv_bias),
            q_norm=None,
            k_norm=None,
            o_proj=draw.linear(config.q_size, hidden),
            post_norm=draw.norm(hidden),
            gate_up_proj=draw.linear(hidden, 2 * width, paired=True),
            down_proj=draw.linear(width, hidden),
        )

    table = draw.table(config.vocab_size, hidden)
    return Decoder(
        config=config,
        backend=backend,
        embed_tokens=table.cpu().pin_memory() if host_embedding else table,
        layers=tuple(layer() for _ in range(config.num_layers)),
        norm=draw.norm(hidden),
        lm_head=backend.head_linear(draw.table(config.vocab_size, hidden, hidden**-0.5)),
    )
