"""Toy models that the quantiser's tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nybble.checkpoint import CheckpointWriter

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices as small as these take longer on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Llama of random weights, three layers, with grouped queries and a tied head."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    folder = tmp_path / "llama"
    with CheckpointWriter(folder) as writer:
        writer.add_json("config.json", LLAMA)
        writer.add("model.embed_tokens.weight", random(264, 64) * 3)
        for index in range(3):
            layer = f"model.layers.{index}."
            for name, shape in {
                "self_attn.q_proj": (64, 64),
                "self_attn.k_proj": (32, 64),
                "self_attn.v_proj": (32, 64),
                "self_attn.o_proj": (64, 64),
                "mlp.gate_proj": (96, 64),
                "mlp.up_proj": (96, 64),
                "mlp.down_proj": (64, 96),
            }.items():
                writer.add(f"{layer}{name}.weight", random(*shape))
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{layer}{name}.weight", 1 + random(64))
        writer.add("model.norm.weight", 1 + random(64))
    return folder


@pytest.fixture
def speaking_llama(llama: Path) -> Path:
    """The same with a tokenizer of single bytes, and texts to measure on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(llama / "tokenizer.json"))
    return llama


@pytest.fixture
def qwen(data: Path, tmp_path: Path) -> Path:
    """The first generation's toy, with NTK, LogN, a fused c_attn and its bias."""
    folder = tmp_path / "qwen"
    shutil.copytree(data / "qwen1-ntk-logn", folder, ignore=shutil.ignore_patterns("expected*"))
    return folder


@pytest.fixture
def windows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 120, (n,), generator=generator).tolist() for n in (48, 48, 40, 21)]


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every file in a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    return read
