"""What each family calls its tensors. Parts of one fused matrix are listed in output order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nybble.config import ModelConfig


@dataclass(frozen=True)
class Names:
    """Checkpoint names: whole ones, and inside a layer relative to `layer.format(index)`."""

    embed_tokens: str
    norm: str
    lm_head: str
    layer: str
    norms: Mapping[str, str]
    linears: Mapping[str, tuple[str, ...]]


_QWEN = Names(
    embed_tokens="transformer.wte",
    norm="transformer.ln_f",
    lm_head="lm_head",
    layer="transformer.h.{}.",
    norms={"input_norm": "ln_1", "post_norm": "ln_2"},
    linears={
        "qkv_proj": ("attn.c_attn",),
        "o_proj": ("attn.c_proj",),
        # w2 is what passes through SiLU.
        "gate_up_proj": ("mlp.w2", "mlp.w1"),
        "down_proj": ("mlp.c_proj",),
    },
)

_LLAMA_NORMS = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
_LLAMA_LINEARS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}


def _llama(norms: Mapping[str, str]) -> Names:
    return Names(
        embed_tokens="model.embed_tokens",
        norm="model.norm",
        lm_head="lm_head",
        layer="model.layers.{}.",
        norms=norms,
        linears=_LLAMA_LINEARS,
    )


NAMES: Mapping[str, Names] = {
    "qwen": _QWEN,
    "qwen2": _llama(_LLAMA_NORMS),
    "llama": _llama(_LLAMA_NORMS),
    "qwen3": _llama({**_LLAMA_NORMS, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}),
}


def linear_names(config: ModelConfig) -> frozenset[str]:
    """Every matrix inside the blocks, by its checkpoint name: what a quantiser quantises."""
    names = NAMES[config.family]
    return frozenset(
        names.layer.format(index) + part
        for index in range(config.num_layers)
        for parts in names.linears.values()
        for part in parts
    )
