"""The byte-level BPE of a GGUF file as tokenizer.json, the format of the `tokenizers` library."""

from __future__ import annotations

from typing import Any

from nybble.checkpoint.gguf_file import GGUFFile

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
# tokenizer.ggml.pre -> how the text is split before the merges.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}


def tokenizer_json(file: GGUFFile) -> dict[str, Any]:
    """tokenizer.json; CheckpointError where the tokenizer is of a kind not known here."""
    splitting = file.get("tokenizer.ggml.pre", str, "")
    if file.get("tokenizer.ggml.model", str) != "gpt2" or splitting not in _PRE_TOKENIZERS:
        raise file.unsupported(f"its tokenizer is of the kind {splitting!r}")
    tokens = file.get("tokenizer.ggml.tokens", list)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise file.unsupported("its vocabulary holds a token twice")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(file, tokens),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[splitting]},
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(file, vocab),
        },
    }


def tokenizer_config_json(file: GGUFFile) -> dict[str, Any]:
    """tokenizer_config.json: the chat template and the names of the special tokens."""
    tokens = file.get("tokenizer.ggml.tokens", list)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get("llama.context_length", int),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        if index >= len(tokens):
            raise file.unsupported(f"its {key} token, {index}, is not in its vocabulary")
        if index >= 0:
            config[f"{role}_token"] = tokens[index]
    if "tokenizer.chat_template" in file.values:
        config["chat_template"] = file.get("tokenizer.chat_template", str)
    return config


def _added_tokens(file: GGUFFile, tokens: list[str]) -> list[dict[str, Any]]:
    kinds = file.get("tokenizer.ggml.token_type", list)
    if len(kinds) != len(tokens):
        raise file.unsupported("tokenizer.ggml.token_type is not as long as the vocabulary")
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]


def _merges(file: GGUFFile, vocab: dict[str, int]) -> list[str]:
    merges: list[str] = file.get("tokenizer.ggml.merges", list)
    for merge in merges:
        parts = merge.split(" ")
        if len(parts) != 2 or not vocab.keys() >= {*parts, "".join(parts)}:
            raise file.unsupported(f"its merge {merge!r} is not in its vocabulary")
    return merges
