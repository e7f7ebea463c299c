"""Finds the tokenizer of a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.errors import CheckpointError
from nybble.tokenizer.base import Tokenizer

_RANKS = "qwen.tiktoken"
_BACKEND = "tokenizer.json"
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` has something to load there; a model runs on ids without it."""
    return any((Path(folder) / name).is_file() for name in (_RANKS, _BACKEND))


def load_tokenizer(folder: Path, extra_vocab_file: Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder: `qwen.tiktoken`, or else `tokenizer.json`.

    Args:
        extra_vocab_file: further `base64 rank` lines for `qwen.tiktoken`; by default the file
            that tokenizer_config.json names, if any.

    Raises:
        CheckpointError: no tokenizer there, or a damaged one.
    """
    folder = Path(folder)
    config = _read_config(folder / "tokenizer_config.json")
    if (folder / _RANKS).is_file():
        from nybble.tokenizer.qwen import QwenTokenizer

        return QwenTokenizer(folder / _RANKS, extra_vocab_file or _extra_vocab_file(folder, config))
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} has neither {_RANKS} nor {_BACKEND}: fetch the checkpoint's "
            "tokenizer files into it, or work with token ids."
        )
    if extra_vocab_file is not None:
        raise CheckpointError(
            f"{folder} has no {_RANKS} that {extra_vocab_file} could extend: leave it out."
        )
    from nybble.tokenizer.fast import JsonTokenizer

    return JsonTokenizer(
        folder / _BACKEND, _chat_template(folder, config), _named_tokens(folder, config)
    )


def _read_config(path: Path) -> Mapping[str, Any]:
    text = _read_text(path)
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON ({error}): fetch it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch it again.")
    return config


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): fetch it again.") from error


def _extra_vocab_file(folder: Path, config: Mapping[str, Any]) -> Path | None:
    name = config.get("extra_vocab_file")
    if name is None:
        return None
    # A downloaded file must not make us open others than its own folder's.
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: extra_vocab_file is {name!r}, no file name in "
            "that folder: put the file there, or pass extra_vocab_file yourself."
        )
    return folder / name


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    text = _read_text(folder / "chat_template.jinja")
    if text is not None:
        return text
    template = config.get("chat_template")
    if isinstance(template, list):
        template = _default_template(template)
        if template is None:
            raise _malformed(folder, "chat_template", 'has no template named "default"')
    if template is not None and not isinstance(template, str):
        raise _malformed(folder, "chat_template", "is neither text nor a list of named templates")
    return template


def _default_template(templates: list[Any]) -> Any:
    entries = (entry for entry in templates if isinstance(entry, dict))
    return next((e.get("template") for e in entries if e.get("name") == "default"), None)


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
        elif config.get(name) is not None:
            raise _malformed(folder, name, "is neither text nor an object with a content")
    return tokens


def _malformed(folder: Path, key: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / 'tokenizer_config.json'}: {key} {why}: fetch the file again or repair it."
    )
