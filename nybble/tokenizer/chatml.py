"""ChatML as the first Qwen generation was trained on it: no template file, a fixed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nybble.errors import RequestError
from nybble.tokenizer.base import DEFAULT_SYSTEM, Message, checked_text
from nybble.tokenizer.messages import read_messages

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
ROLES = ("system", "user", "assistant")

Entry = tuple[str, str]  # (role, content)


def read_entries(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any],
) -> list[Entry]:
    """The chat as (role, content) entries that start with a system prompt.

    Raises:
        RequestError: tools or template arguments (this form has neither), a role that the model
            does not know, a system message that is not the first, a content that is not text.
    """
    if tools:
        raise RequestError(
            "This model's chat form has no tools: describe them in the system message."
        )
    if template_kwargs:
        raise RequestError(
            f"This model's chat form takes no {sorted(template_kwargs)[0]!r}: leave it out."
        )
    entries = [_read_entry(m, i) for i, m in enumerate(read_messages(messages))]
    return entries if entries[0][0] == "system" else [("system", DEFAULT_SYSTEM), *entries]


def _read_entry(message: Message, index: int) -> Entry:
    role, where = message["role"], f"messages[{index}]"
    if role not in ROLES:
        raise RequestError(f"{where} has the role {role!r}: use one of {', '.join(ROLES)}.")
    if role == "system" and index > 0:
        raise RequestError(f"{where} is a second system message: keep one, at the start.")
    return role, checked_text(message["content"], f"The content of {where}")


def render(entries: Sequence[Entry], add_generation_prompt: bool) -> str:
    """The chat as text."""
    blocks = [f"{IM_START}{role}\n{content}{IM_END}" for role, content in entries]
    if add_generation_prompt:
        blocks.append(f"{IM_START}assistant\n")
    return "\n".join(blocks)
