"""What was said so far, and which part of it still fits the context."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nybble.errors import RequestError

Message = dict[str, str]
Turn = tuple[str, str]  # (user, assistant)


@dataclass
class Conversation:
    """A system prompt (None: the model's own) and the turns after it."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, query: str | None = None) -> list[Message]:
        """The chat in OpenAI's form, `query` as its last message."""
        messages = [] if self.system is None else [_message("system", self.system)]
        for user, assistant in self.turns:
            messages += [_message("user", user), _message("assistant", assistant)]
        return messages if query is None else [*messages, _message("user", query)]

    def prompt(
        self, query: str, encode: Callable[[list[Message]], list[int]], room: int
    ) -> tuple[list[int], int]:
        """Ids of the prompt for `query`, and how many of the oldest turns were dropped for it.

        Turns are forgotten until the prompt has at most `room` tokens or none is left.
        """
        dropped = 0
        ids = encode(self.messages(query))
        while len(ids) > room and self.turns:
            self.turns.pop(0)
            dropped += 1
            ids = encode(self.messages(query))
        return ids, dropped

    def save(self, path: Path) -> None:
        """Write {"messages": [...]} to a new file; RequestError where that cannot be."""
        text = json.dumps({"messages": self.messages()}, indent=2, ensure_ascii=False)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError:
            raise RequestError(f"{path} exists already: choose another name.") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RequestError(
                f"{path} cannot be written ({reason}): choose another place."
            ) from error


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
