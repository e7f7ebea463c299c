"""Reads the prompts of a batch: JSON Lines, all of them checked before the first one is run."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nybble.errors import ConfigError, RequestError
from nybble.sampling import SamplingParams
from nybble.tokenizer.base import checked_text
from nybble.tokenizer.messages import read_messages

# The answers have no place for log-probabilities.
_SETTINGS = tuple(field.name for field in fields(SamplingParams) if field.name != "logprobs")
_LISTS = {"stop": (str, list), "stop_token_ids": (list,)}


@dataclass(frozen=True)
class Row:
    """One prompt. line: where it stands in the file, from 1. settings: of SamplingParams.

    Either `prompt` (a text or token ids, continued as it is) or `messages` (a chat) is there.
    """

    line: int
    id: str | int | None
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    settings: Mapping[str, Any]

    def params(self, defaults: SamplingParams) -> SamplingParams:
        return replace(defaults, **self.settings)


def read_rows(path: Path) -> list[Row]:
    """The prompts of a file; empty lines are passed over.

    ConfigError where the file cannot be read or any line is bad: it names the first one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror or error}): give a file of prompts."
        ) from error
    rows: list[Row] = []
    bad: dict[int, str] = {}
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(_row(number, line))
            except RequestError as error:
                bad[number] = str(error)
    bad |= _repeated_ids(rows)
    if bad:
        raise _refusal(path, bad)
    if not rows:
        raise ConfigError(f'{path} has no prompts: write lines such as {{"prompt": "Once"}}.')
    return rows


def _refusal(path: Path, bad: Mapping[int, str]) -> ConfigError:
    first = min(bad)
    others = f" {len(bad) - 1} more lines are bad." if len(bad) > 1 else ""
    return ConfigError(f"{path}, line {first}: {bad[first]}{others} Nothing was run.")


def _repeated_ids(rows: list[Row]) -> dict[int, str]:
    seen: dict[str | int, int] = {}
    repeated = {}
    for row in rows:
        if row.id is not None and seen.setdefault(row.id, row.line) != row.line:
            repeated[row.line] = (
                f"the id {row.id!r} is that of line {seen[row.id]} too: give each its own."
            )
    return repeated


def _row(number: int, line: bytes) -> Row:
    """RequestError with what is wrong, and what to write instead."""
    data = _json_object(line)
    prompt, messages = data.pop("prompt", None), data.pop("messages", None)
    if (prompt is None) == (messages is None):
        raise RequestError(
            'it needs either a prompt or messages: write {"prompt": "Once"} or '
            '{"messages": [{"role": "user", "content": "Hi"}]}.'
        )
    row = Row(
        line=number,
        id=_checked_id(data.pop("id", None)),
        prompt=None if prompt is None else _checked_prompt(prompt),
        messages=None if messages is None else read_messages(messages),
        settings=_checked_settings(data),
    )
    row.params(SamplingParams())
    return row


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"it is not UTF-8 at byte {error.start}: convert the file.") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is not valid JSON ({error}): write one object a line.") from error
    if not isinstance(data, dict):
        raise RequestError('it is no JSON object: write {"prompt": "Once"}, say.')
    return data


def _checked_id(value: object) -> str | int | None:
    if isinstance(value, str):
        return checked_text(value, "its id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise RequestError(f"its id is {value!r}: give a text or a whole number.")


def _checked_prompt(prompt: object) -> str | list[int]:
    if isinstance(prompt, str) and prompt:
        return checked_text(prompt, "its prompt")
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise RequestError("its prompt is empty or no text: give a text, or a list of token ids.")


def _checked_settings(data: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in data.items():
        if name not in _SETTINGS:
            raise RequestError(
                f"it has a field {name!r}: use prompt or messages, id, {', '.join(_SETTINGS)}."
            )
        if name in _LISTS and not isinstance(value, _LISTS[name]):
            raise RequestError(f"its {name} is {value!r}: give a list.")
    return data
