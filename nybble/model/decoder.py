"""The decoder of every family: pre-norm attention and SwiGLU blocks over flat tokens.

Nothing here knows how a matrix is stored: a linear is a function (tokens, K) -> (tokens, N).
What differs between families is a field that is None or a number in ModelConfig.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nybble.config import ModelConfig
from nybble.kernels import open_pages
from nybble.kernels.backend import Backend, Batch, KVLayer, LinearFn
from nybble.model.rope import Positions


@dataclass(frozen=True)
class Layer:
    """The weights of one block. q_norm and k_norm (head_dim,) exist in Qwen3 only."""

    input_norm: torch.Tensor  # (hidden,)
    qkv_proj: LinearFn  # hidden -> q_size + 2 * kv_size
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o_proj: LinearFn  # q_size -> hidden
    post_norm: torch.Tensor  # (hidden,)
    gate_up_proj: LinearFn  # hidden -> 2 * intermediate, gate first
    down_proj: LinearFn  # intermediate -> hidden


@dataclass(frozen=True)
class Step:
    """One forward pass over the next tokens of some sequences.

    `positions` holds the factors of exactly these tokens, row by row; `layers` the keys and
    values of all tokens before them, and receives theirs in the slots that `batch` names.
    """

    positions: Positions
    batch: Batch
    layers: Sequence[KVLayer]


@dataclass(frozen=True)
class Decoder:
    """A loaded model. `forward` runs one step and writes the new keys and values."""

    config: ModelConfig
    backend: Backend
    embed_tokens: torch.Tensor  # (vocab, hidden), on the device or in pinned main memory
    layers: tuple[Layer, ...]
    norm: torch.Tensor  # (hidden,)
    lm_head: LinearFn  # hidden -> vocab

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, step: Step, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids int64 (tokens,) -> logits fp32 (sequences, vocab) after the last token of each.

        rows: integers (rows,): after these tokens instead, (rows, vocab).
        """
        x = self.embed(ids)
        for index in range(len(self.layers) - 1):
            x = self.block(index, x, step)
        last = rows is None and x.shape[0] > step.batch.sequences
        x = self.block(len(self.layers) - 1, x, step, last=last)
        return self.head(x if rows is None else x.index_select(0, rows))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.backend.embed(ids, self.embed_tokens)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backend.rms_norm(x, self.norm, self.config.norm_eps)
        return self.lm_head(x).float()

    def block(self, index: int, x: torch.Tensor, step: Step, *, last: bool = False) -> torch.Tensor:
        """x (tokens, hidden) -> the same, one block further.

        last: only the last token of each sequence, (sequences, hidden); keys and values of all.
        """
        layer, ops, eps = self.layers[index], self.backend, self.config.norm_eps
        attended = self.attention(index, x, step, last=last)
        if last:
            x = x.index_select(0, step.batch.ends)
        x = ops.add_linear(x, layer.o_proj, attended)
        return ops.add_mlp(x, layer.post_norm, eps, layer.gate_up_proj, layer.down_proj)

    def attention(
        self, index: int, x: torch.Tensor, step: Step, *, last: bool = False
    ) -> torch.Tensor:
        """x (tokens, hidden) -> what o_proj is given. last: see block."""
        layer, config, at = self.layers[index], self.config, step.positions
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = self.backend.norm_linear(x, layer.input_norm, config.norm_eps, layer.qkv_proj)
        qkv = qkv.view(x.shape[0], -1, config.head_dim)
        q, k, v = qkv.split_with_sizes(heads, 1)  # (tokens, heads, head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self.backend.rms_norm(q, layer.q_norm, config.norm_eps)
            k = self.backend.rms_norm(k, layer.k_norm, config.norm_eps)
        cache, batch, scale = step.layers[index], step.batch, config.head_dim**-0.5
        if cache.seats is not None:
            rotary = (at.cos, at.sin)
            out = open_pages.attention(
                self.backend, (q, k, v), rotary, cache, batch, scale, at.query_scale
            )
            return out.index_select(0, batch.ends) if last else out
        q = self.backend.rope_store(q, k, v, at.cos, at.sin, cache, batch)
        if at.query_scale is not None:
            q = (q * at.query_scale).to(q.dtype)
        if last:
            q, batch = q.index_select(0, batch.ends), batch.of_ends()
        return self.backend.attention(q, cache, batch, scale, reader=layer.o_proj)

    @torch.inference_mode()
    def trace(self, ids: torch.Tensor, step: Step) -> Iterator[tuple[str, torch.Tensor]]:
        """The hidden states after each part, by name: for finding where a value went wrong."""
        x = self.embed(ids)
        yield "the embedding", x
        for index in range(len(self.layers)):
            x = self.block(index, x, step)
            yield f"layer {index}", x
        yield "the output head", self.head(x)
