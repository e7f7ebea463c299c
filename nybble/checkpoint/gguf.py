"""Import of a Llama-shaped GGUF file as an ordinary 16-bit model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nybble.checkpoint.files import Progress
from nybble.checkpoint.gguf_file import GGUFFile, open_gguf
from nybble.checkpoint.gguf_tokenizer import tokenizer_config_json, tokenizer_json
from nybble.checkpoint.writer import CheckpointWriter

_FP16_MAX = 65504.0
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What a model's authors recommend, by the file's own general.basename; a bound on the answer's
# length besides, since a model this small may not find its end.
_SAMPLING = {
    "smollm2": {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_new_tokens": 512}
}


def import_gguf(path: Path, out_folder: Path, progress: Progress | None = None) -> None:
    """Write the Llama-shaped GGUF file `path` as a folder of fp16 safetensors and JSON files.

    Quantised tensors are dequantised, GGUF's interleaved rows of q and k put back into the
    half-split order, tokenizer and chat template taken from the file. `progress` counts
    tensors. CheckpointError: another architecture, or anything that is not understood.
    """
    file = open_gguf(Path(path))
    config = _config(file)
    shapes = _tensor_shapes(config)
    _check_tensors(file, shapes)
    with CheckpointWriter(out_folder) as writer:
        writer.add_json("config.json", config)
        writer.add_json("generation_config.json", _generation_config(file, config))
        writer.add_json("tokenizer.json", tokenizer_json(file))
        writer.add_json("tokenizer_config.json", tokenizer_config_json(file))
        for done, name in enumerate(shapes, start=1):
            writer.add(_llama_name(name), _weight(file, config, name))
            if progress is not None:
                progress(done, len(shapes))


def _config(file: GGUFFile) -> dict[str, Any]:
    """config.json of the imported model, in the terms of LlamaForCausalLM."""
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise file.unsupported(f"its architecture is {architecture!r}")
    if file.get("llama.expert_count", int, 0):
        raise file.unsupported("it is a mixture of experts")
    if file.get("llama.rope.scaling.type", str, "none") != "none":
        raise file.unsupported("it scales RoPE")
    hidden = file.get("llama.embedding_length", int)
    heads = file.get("llama.attention.head_count", int)
    if heads < 1 or hidden % heads:
        raise file.unsupported(f"{heads} heads do not divide the {hidden} hidden dimensions")
    head_dim = file.get("llama.attention.key_length", int, hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.get(key, int, head_dim) != head_dim:
            raise file.unsupported(f"{key} is not the head dimension, {head_dim}")
    layers = file.get("llama.block_count", int)
    if layers > len(file.tensors):
        raise file.unsupported(f"{layers} blocks cannot be made of {len(file.tensors)} tensors")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id", int),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": file.get("llama.feed_forward_length", int),
        "max_position_embeddings": file.get("llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", int, heads),
        "rms_norm_eps": file.get("llama.attention.layer_norm_rms_epsilon", float),
        "rope_scaling": None,
        "rope_theta": file.get("llama.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": len(file.get("tokenizer.ggml.tokens", list)),
    }


def _generation_config(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    padding = file.get("tokenizer.ggml.padding_token_id", int, config["eos_token_id"])
    sampling = _SAMPLING.get(file.get("general.basename", str, ""), {})
    return {**tokens, "pad_token_id": padding, **sampling}


def _tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama-shaped GGUF must hold, and their shapes (outputs, inputs)."""
    hidden, ffn, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = (vocab, hidden)
    return shapes


def _check_tensors(file: GGUFFile, shapes: dict[str, tuple[int, ...]]) -> None:
    for name in file.tensors:
        if name not in shapes:
            raise file.unsupported(f"it holds the tensor {name!r}, which no plain Llama has")
    for name, shape in shapes.items():
        if name not in file.tensors:
            raise file.unsupported(f"it lacks the tensor {name!r}")
        found = tuple(int(size) for size in reversed(file.tensors[name].shape))
        if found != shape:
            raise file.unsupported(f"tensor {name!r} is {found} where {shape} is expected")


def _llama_name(name: str) -> str:
    """The name of a GGUF tensor in LlamaForCausalLM."""
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in outside:
        return outside[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"


def _weight(file: GGUFFile, config: dict[str, Any], name: str) -> torch.Tensor:
    """A tensor of the file, dequantised, its rows in LlamaForCausalLM's order, fp16."""
    from gguf import dequantize

    tensor = file.tensors[name]
    try:
        weight = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise file.unsupported(f"tensor {name!r} has the type {tensor.tensor_type.name}") from error
    if name.endswith("attn_q.weight"):
        weight = half_split_rows(weight, config["num_attention_heads"])
    elif name.endswith("attn_k.weight"):
        weight = half_split_rows(weight, config["num_key_value_heads"])
    if not np.abs(weight).max() <= _FP16_MAX:  # NaN fails too
        raise file.unsupported(f"tensor {name!r} holds values that fp16 does not")
    return torch.from_numpy(weight.astype(np.float16))


def half_split_rows(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Undo GGUF's order of the rows of q or k, (heads * head_dim, inputs).

    GGUF interleaves the two halves of each head (0, d/2, 1, d/2 + 1, ...), for RoPE that turns
    neighbours; LlamaForCausalLM turns row i with row i + d/2.
    """
    rows, inputs = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(rows, inputs)
