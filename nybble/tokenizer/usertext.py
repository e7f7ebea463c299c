"""Tells the text of users from the text of a chat template, character by character.

Why and how: docs/decisions/001-chat-injection.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, SupportsIndex

from nybble.errors import RequestError
from nybble.tokenizer.base import checked_text

_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # Unicode's Supplementary Private Use Area-A


class Marking:
    """Twins for every character that control tokens are written with, whitespace apart.

    The twins are private characters that occur nowhere in `seen`, so that `unmark` undoes `mark`
    and nothing else. One marking serves one rendering.
    """

    def __init__(self, control_tokens: Iterable[str], seen: Iterable[str]) -> None:
        characters = sorted({c for token in control_tokens for c in token if not c.isspace()})
        used = set().union(*map(set, seen), characters)
        free = (code for code in _PRIVATE_USE if chr(code) not in used)
        twins = dict(zip(map(ord, characters), free, strict=False))
        if len(twins) < len(characters):
            raise RequestError("The chat uses up Unicode's private characters: remove some.")
        self._twins = twins
        self._plain = {twin: char for char, twin in twins.items()}

    def mark(self, text: str) -> UserText:
        return UserText(text.translate(self._twins), self)

    def unmark(self, text: str) -> str:
        return text.translate(self._plain)

    def mark_all(self, value: Any) -> Any:
        """JSON-like data with every string in it marked, keys included."""
        return map_strings(self.mark, value)

    def unmark_all(self, value: Any) -> Any:
        return map_strings(self.unmark, value)


class UserText(str):
    """A string whose characters are marked, but that answers questions as if they were not.

    A template can search, compare, split and strip it as it would the plain text; what it prints
    are the twins. Joined to a template's own text, each character keeps its mark.
    """

    marking: Marking

    def __new__(cls, marked: str, marking: Marking) -> UserText:
        text = super().__new__(cls, marked)
        text.marking = marking
        return text

    @property
    def plain(self) -> str:
        return self.marking.unmark(self)

    def __hash__(self) -> int:
        return hash(self.plain)

    def __getitem__(self, key: SupportsIndex | slice) -> UserText:
        return self._marked(super().__getitem__(key))

    def __add__(self, other: str) -> UserText:
        return self._marked(super().__add__(other))

    def __radd__(self, other: str) -> UserText:
        return self._marked(str.__add__(other, self))

    def strip(self, chars: str | None = None) -> UserText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> UserText:
        return self[len(self) - len(self.plain.lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> UserText:
        return self[: len(self.plain.rstrip(_plain(chars)))]

    def removeprefix(self, prefix: str) -> UserText:
        return self[len(self) - len(self.plain.removeprefix(_plain(prefix))) :]

    def removesuffix(self, suffix: str) -> UserText:
        return self[: len(self.plain.removesuffix(_plain(suffix)))]

    def split(  # type: ignore[override]
        self, sep: str | None = None, maxsplit: SupportsIndex = -1
    ) -> list[UserText]:
        return self._split(super().split, str.split, sep, maxsplit)

    def rsplit(  # type: ignore[override]
        self, sep: str | None = None, maxsplit: SupportsIndex = -1
    ) -> list[UserText]:
        return self._split(super().rsplit, str.rsplit, sep, maxsplit)

    def partition(self, sep: str) -> tuple[UserText, UserText, UserText]:
        head, middle, tail = self._slices(self.plain.partition(_plain(sep)))
        return head, middle, tail

    def rpartition(self, sep: str) -> tuple[UserText, UserText, UserText]:
        head, middle, tail = self._slices(self.plain.rpartition(_plain(sep)))
        return head, middle, tail

    def splitlines(self, keepends: bool = False) -> list[UserText]:  # type: ignore[override]
        return [self._marked(line) for line in super().splitlines(keepends)]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> UserText:
        if not old:
            return self._marked(super().replace(old, new, count))
        return self._marked(new.join(self.split(old, count)))

    def _split(
        self,
        by_space: Callable[..., list[str]],
        by_text: Callable[..., list[str]],
        sep: str | None,
        maxsplit: SupportsIndex,
    ) -> list[UserText]:
        if sep is None:  # whitespace has no twins
            return [self._marked(piece) for piece in by_space(None, maxsplit)]
        sep = _plain(sep)
        return self._slices(by_text(self.plain, sep, maxsplit), gap=len(sep))

    def _slices(self, pieces: Sequence[str], gap: int = 0) -> list[UserText]:
        """The marked counterparts of pieces of the plain text, `gap` characters apart."""
        starts = accumulate((len(piece) + gap for piece in pieces), initial=0)
        return [self[s : s + len(piece)] for s, piece in zip(starts, pieces, strict=False)]

    def _marked(self, text: str) -> UserText:
        return UserText(text, self.marking)


def map_strings(change: Callable[[str], str], value: Any) -> Any:
    """JSON-like data with `change` applied to every string; anything else is a RequestError."""
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {map_strings(change, k): map_strings(change, v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [map_strings(change, item) for item in value]
    raise RequestError(
        f"The chat holds a {type(value).__name__}: pass text, numbers, lists and dicts only."
    )


def strings_in(value: Any) -> Iterator[str]:
    """Every string of JSON-like data, keys included, checked to have a UTF-8 form."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(checked_text(text, "A text of the chat"))
        return text

    map_strings(note, value)
    return iter(found)


def _ask_plain(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def ask(self: UserText, *args: Any) -> Any:
        return method(self.plain, *map(_plain, args))

    return ask


def _change_plain(name: str) -> Callable[..., UserText]:
    method = getattr(str, name)

    def change(self: UserText) -> UserText:
        return self.marking.mark(method(self.plain))

    return change


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.plain if isinstance(value, UserText) else value


_QUESTIONS = """
    __contains__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ startswith endswith find rfind index
    rindex count isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric istitle
    isupper
"""
_CHANGES = "capitalize casefold lower swapcase title upper"
for _name in _QUESTIONS.split():
    setattr(UserText, _name, _ask_plain(_name))
for _name in _CHANGES.split():
    setattr(UserText, _name, _change_plain(_name))
