"""Calibration data: files of text or chats -> windows of token ids.

Formats, told apart by the file's name and first character:
- .jsonl: one object a line, {"text": "..."} or {"messages": [{"role", "content"}, ...]};
- .json: a list of such objects, or of {"id", "conversations": [{"from", "value"}, ...]}, the form
  in which the first Qwen repository took fine-tuning data;
- anything else is plain text.
Chats go through the model's own template, so that the weights are fitted to what they will see.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from nybble.checkpoint.files import file_errors
from nybble.errors import ConfigError, NybbleError
from nybble.tokenizer import Message, Tokenizer

_LEAST_TOKENS = 256
# What the first generation's fine-tuning data calls the speakers.
_SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass(frozen=True)
class CalibrationOptions:
    """At most `samples` windows of at most `length` tokens; seed None takes the first ones."""

    samples: int = 128
    length: int = 2048
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: give at least 1.")


_DEFAULT = CalibrationOptions()


def read_windows(
    tokenizer: Tokenizer, path: Path | None = None, options: CalibrationOptions = _DEFAULT
) -> list[list[int]]:
    """The calibration windows of a file, or of the text that nybble brings along.

    Long texts are cut into windows, chats are cut off at one; a text's tail shorter than a
    window is a window too, unless other windows of it are full. Raises ConfigError, which names
    the line, for an empty or too short file, one that is not UTF-8, and lines of another form.
    """
    where = "The default calibration text" if path is None else str(path)
    windows: list[list[int]] = []
    tokens = 0
    for ids, whole in _documents(tokenizer, path):
        tokens += len(ids)
        if ids:
            windows += [ids[: options.length]] if whole else _cut(ids, options.length)
    if tokens < _LEAST_TOKENS:
        raise ConfigError(
            f"{where} gives {tokens} tokens, too few to measure anything: give at least "
            f"{_LEAST_TOKENS}, better some ten thousand."
        )
    if options.seed is not None:
        random.Random(options.seed).shuffle(windows)
    return windows[: options.samples]


def read_text(path: Path) -> str:
    """A UTF-8 file. ConfigError: no file, empty, or not UTF-8 at a byte that is named."""
    with file_errors(path):
        if not path.is_file():
            problem = "is no plain file" if path.exists() else "does not exist"
            raise ConfigError(f"{path} {problem}: give a file with text.")
        data = path.read_bytes()
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 at byte {error.start}: convert it first."
        ) from error
    if not text.strip():
        raise ConfigError(f"{path} is empty: give a file with text.")
    return text


def _cut(ids: list[int], length: int) -> list[list[int]]:
    full = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return full or [ids]


def _documents(tokenizer: Tokenizer, path: Path | None) -> Iterator[tuple[list[int], bool]]:
    """The ids of each document, and whether it is one whole: a chat, not to be cut in windows."""
    if path is None:
        text = resources.files("nybble.gptq").joinpath("calibration.txt").read_text("utf-8")
        yield tokenizer.encode(text), False
        return
    text = read_text(path)
    if path.suffix not in (".jsonl", ".json"):
        yield tokenizer.encode(text), False
        return
    for place, record in _records(path, text):
        try:
            yield _record_ids(tokenizer, record)
        except NybbleError as error:
            raise ConfigError(f"{path}, {place}: {error}") from error


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        records = _parse(text, str(path))
        yield from ((f"item {number}", record) for number, record in enumerate(records, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse(line, f"{path}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON ({error}): correct or remove it.") from error


def _record_ids(tokenizer: Tokenizer, record: object) -> tuple[list[int], bool]:
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return tokenizer.encode(record["text"]), False
        for key, read in (("messages", list), ("conversations", _conversation)):
            if isinstance(record.get(key), list):
                messages: Sequence[Message] = read(record[key])
                return tokenizer.apply_chat(messages, add_generation_prompt=False), True
    raise ConfigError('nothing to read here: give "text", "messages" or "conversations".')


def _conversation(turns: list[Any]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        speaker = _SPEAKERS.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if speaker is None or not isinstance(turn.get("value"), str):
            raise ConfigError('a turn needs "from" (system, user or assistant) and a text "value".')
        messages.append({"role": speaker, "content": turn["value"]})
    return messages
