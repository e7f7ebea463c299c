"""Reads chat messages in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nybble.errors import RequestError
from nybble.tokenizer.base import Message


def read_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as plain dicts with a role, their lists of text parts joined to one text.

    Raises:
        RequestError: no messages, a message without a role, a content that is not text.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(
            'Give the chat as a non-empty list of {"role": ..., "content": ...} messages.'
        )
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _read_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f'{where} has no role: give {{"role": "user", "content": "..."}}.')
    return {**message, "content": _text_of(message.get("content"), where)}


def _text_of(content: object, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} has a content of {type(content).__name__}: give text.")
    return "".join(_part_text(part, where) for part in content)


def _part_text(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise RequestError(f"{where} has a content part that is no text: this engine takes text only.")
