"""GGUF import: a tiny file with known truth, written by the `gguf` package."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nybble.checkpoint import Checkpoint, import_gguf, read_json
from nybble.errors import CheckpointError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
TEXTS = ["The year 1984 was the year.", "the the thesis, then thirty-three", "naïve 日本 café"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE as its authors would train it: the independent truth."""
    result = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    result.pre_tokenizer = byte_level
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(token, special=True) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    result.train_from_iterator(TEXTS * 5, trainer)
    assert result.token_to_id("19")  # a merge that the splitting into digits must prevent
    digits = pre_tokenizers.Digits(individual_digits=True)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    return result


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        vocab_size=tokenizer.get_vocab_size(),
        tie_word_embeddings=False,
        rope_theta=1234.0,
    )
    return LlamaForCausalLM(config).half().float()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order, row by row: rows 2i and 2i + 1 of a head are its rows i and i + d/2."""
    half = len(weight) // heads // 2
    starts = [head * 2 * half + i for head in range(heads) for i in range(half)]
    rows = [row for start in starts for row in (start, start + half)]
    return weight[rows]


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    names |= {"self_attn.o_proj": "attn_output"}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if ours == "attn_q" else KV_HEADS)
            tensors[f"blk.{layer}.{ours}.weight"] = weight
    return tensors


def fields(tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "general.basename": "smollm2",
        "llama.block_count": LAYERS,
        "llama.context_length": 512,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 1234.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(
    path: Path,
    values: dict[str, Any],
    tensors: dict[str, np.ndarray],
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    architecture: str = "llama",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in values.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, weight in tensors.items():
        kind = (types or {}).get(name)
        data = weight if kind is None else gguf.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> Path:
    base = tmp_path_factory.mktemp("gguf")
    path = write_gguf(base / "tiny.gguf", fields(tokenizer), gguf_tensors(model))
    steps: list[tuple[int, int]] = []
    import_gguf(path, base / "tiny", lambda done, total: steps.append((done, total)))
    count = 9 * LAYERS + 3
    assert steps == [(i + 1, count) for i in range(count)]
    return base / "tiny"


def test_weights_come_back_in_their_own_order(folder: Path, model: LlamaForCausalLM) -> None:
    checkpoint = Checkpoint.open(folder)
    state = model.state_dict()
    assert sorted(checkpoint.names()) == sorted(state)
    for name, weight in state.items():
        assert torch.equal(checkpoint.expect(name, dtypes=[torch.float16]).float(), weight), name


def test_transformers_computes_the_same_from_the_imported_folder(
    folder: Path, model: LlamaForCausalLM
) -> None:
    imported = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(imported(ids).logits, model(ids).logits, atol=1e-5)


def test_config_json_says_what_the_file_says(folder: Path) -> None:
    config = read_json(folder / "config.json")
    expected = {
        "model_type": "llama",
        "head_dim": HEAD_DIM,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,  # not the float32 next to it
        "rope_theta": 1234.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }
    assert config.items() >= expected.items()
    generation = read_json(folder / "generation_config.json")
    expected = {"eos_token_id": 2, "do_sample": True, "temperature": 0.2, "top_p": 0.9}
    expected["max_new_tokens"] = 512
    assert generation.items() >= expected.items()


@given(text=st.text() | st.sampled_from([*TEXTS, "a<|im_end|>b <|im_start|>", "x 12 345"]))
def test_the_imported_tokenizer_is_the_trained_one(
    folder: Path, tokenizer: Tokenizer, text: str
) -> None:
    imported = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert imported.encode(text).ids == ids
    assert imported.decode(ids, skip_special_tokens=False) == tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_tokens_that_a_user_added_are_whole_but_not_special(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    values, added = fields(tokenizer), tokenizer.token_to_id("19")
    values["tokenizer.ggml.token_type"][added] = 4
    import_gguf(write_gguf(tmp_path / "t.gguf", values, gguf_tensors(model)), tmp_path / "out")
    imported = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    ids = imported.encode("1984<|im_end|>").ids
    assert ids[0] == added
    assert imported.decode(ids, skip_special_tokens=True) == "1984"


def test_special_tokens_and_template_reach_transformers(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    ids = loaded.apply_chat_template([{"role": "user", "content": "7"}], return_dict=False)
    assert ids[0] == 1
    assert loaded.decode(ids) == "<|im_start|>user\n7"


def test_quantised_tensors_and_tied_embeddings(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    tensors = gguf_tensors(model)
    del tensors["output.weight"]
    types = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q4_1,
    }
    path = write_gguf(tmp_path / "t.gguf", fields(tokenizer), tensors, types)
    import_gguf(path, tmp_path / "out")
    assert read_json(tmp_path / "out/config.json")["tie_word_embeddings"] is True
    checkpoint, state = Checkpoint.open(tmp_path / "out"), model.state_dict()
    assert "lm_head.weight" not in checkpoint
    for name, steps in (
        ("model.embed_tokens.weight", 127),
        ("model.layers.0.self_attn.q_proj.weight", 15),
    ):
        truth = state[name]
        blocks = truth.reshape(-1, 32)
        width = (blocks.amax(1) - blocks.amin(1)) if steps == 15 else blocks.abs().amax(1)
        error = (checkpoint.tensor(name).float() - truth).reshape(-1, 32).abs().amax(1)
        # Half a step, and what fp16 rounds.
        assert (error <= 0.51 * width / steps + truth.abs().max() / 1000).all()
        assert error.max() > 0


def changed(**values: Any) -> Edit:
    def edit(fields: dict[str, Any], _: dict[str, np.ndarray]) -> None:
        for key, value in values.items():
            fields[key.replace("__", ".")] = value

    return edit


def with_tensor(name: str, value: float | None = None, shape: Any = None) -> Edit:
    def edit(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        weight = tensors.get(name, np.zeros((1,), np.float32))
        weight = np.zeros(shape, np.float32) if shape else weight.copy()
        if value is not None:
            weight.flat[0] = value
        tensors[name] = weight

    return edit


def with_integers(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].astype(np.int8)


UNSUPPORTED: dict[str, Edit] = {
    "mixture of experts": changed(llama__expert_count=4),
    "scales RoPE": changed(llama__rope__scaling__type="yarn"),
    "do not divide": changed(llama__attention__head_count=7),
    "not the head dimension": changed(llama__rope__dimension_count=8),
    "block_count is 'two', not of type int": changed(llama__block_count="two"),
    "lacks the tensor 'blk.2": changed(llama__block_count=3),
    "4294967295 blocks cannot be made": changed(llama__block_count=2**32 - 1),
    "'blk.0.attn_q.bias', which no plain": with_tensor("blk.0.attn_q.bias"),
    r"'blk.1.ffn_up.weight' is \(8, 64\)": with_tensor("blk.1.ffn_up.weight", shape=(8, HIDDEN)),
    "'blk.1.ffn_up.weight' has the type I8": with_integers,
    "values that fp16 does not": with_tensor("blk.1.ffn_up.weight", 1e6),
    "'output_norm.weight' holds values": with_tensor("output_norm.weight", float("nan")),
    "of the kind 'qwen2'": changed(tokenizer__ggml__pre="qwen2"),
    "of the kind 'smollm'": changed(tokenizer__ggml__model="llama"),
    "'x y' is not in its vocabulary": changed(tokenizer__ggml__merges=["t h", "x y"]),
    "'th' is not in its vocabulary": changed(tokenizer__ggml__merges=["th"]),
    "token_type is not as long": changed(tokenizer__ggml__token_type=[3, 1]),
    "padding token, 9999": changed(tokenizer__ggml__padding_token_id=9999),
}


@pytest.mark.parametrize("problem", UNSUPPORTED)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, problem: str
) -> None:
    values, tensors = fields(tokenizer), gguf_tensors(model)
    UNSUPPORTED[problem](values, tensors)
    path = write_gguf(tmp_path / "t.gguf", values, tensors)
    with pytest.raises(CheckpointError, match=problem) as caught:
        import_gguf(path, tmp_path / "out")
    assert "t.gguf" in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["t.gguf"]


def test_another_architecture_and_a_doubled_token_are_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    path = write_gguf(tmp_path / "g.gguf", {}, {}, architecture="gemma")
    with pytest.raises(CheckpointError, match="architecture is 'gemma'"):
        import_gguf(path, tmp_path / "out")
    values = fields(tokenizer)
    values["tokenizer.ggml.tokens"][-1] = values["tokenizer.ggml.tokens"][-2]
    path = write_gguf(tmp_path / "t.gguf", values, gguf_tensors(model))
    with pytest.raises(CheckpointError, match="a token twice"):
        import_gguf(path, tmp_path / "out")


def test_a_cut_or_foreign_file_is_refused(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    path = write_gguf(tmp_path / "t.gguf", fields(tokenizer), gguf_tensors(model))
    whole = path.read_bytes()
    for size in [4, 10, 30, *range(100, len(whole), len(whole) // 40)]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"t\.gguf is cut off or damaged"):
            import_gguf(path, tmp_path / "out")
    for content, problem in (
        (b"", "no GGUF file"),
        (b"PK\3\4", "no GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=problem):
            import_gguf(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not exist"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "out")


def test_arrays_nested_without_end_are_refused(tmp_path: Path) -> None:
    array, number = 9, 4
    nested = struct.pack("<IQ", array, 1) * 3000 + struct.pack("<IQI", number, 1, 0)
    path = tmp_path / "t.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", array) + nested
    )
    with pytest.raises(CheckpointError, match=r"t\.gguf is cut off or damaged"):
        import_gguf(path, tmp_path / "out")


def test_an_interrupted_import_leaves_nothing(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    path = write_gguf(tmp_path / "t.gguf", fields(tokenizer), gguf_tensors(model))

    def interrupt(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(path, tmp_path / "out", interrupt)
    assert [item.name for item in tmp_path.iterdir()] == ["t.gguf"]
