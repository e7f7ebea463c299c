"""Model folders of toy size, made on the spot: random weights, a small trained tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def llama_weights(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 weights under the names of the Llama family."""
    generator = torch.manual_seed(seed)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm": (hidden,),
            layer + "post_attention_layernorm": (hidden,),
            layer + "self_attn.q_proj": (q, hidden),
            layer + "self_attn.k_proj": (kv, hidden),
            layer + "self_attn.v_proj": (kv, hidden),
            layer + "self_attn.o_proj": (hidden, q),
            layer + "mlp.gate_proj": (width, hidden),
            layer + "mlp.up_proj": (width, hidden),
            layer + "mlp.down_proj": (hidden, width),
        }
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.2
        + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 ids with ChatML's control tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_llama(folder: Path, tokenizer: bool = True, **changes: Any) -> Path:
    """A whole Llama-shaped folder; `changes` go into config.json. Returns the folder."""
    config = {**CONFIG, **changes}
    save_file(llama_weights(config), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder)
    return folder
