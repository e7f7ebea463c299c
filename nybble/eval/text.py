"""Texts measured in tokens: cut to a length, or repeated to it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

Tokens = Callable[[str], Sequence[str]]
"""Cuts a text into the tokens of a model."""

_PIECE = re.compile(r"\S+\s*")
_SAMPLE = 5000  # words from which the tokens a word are estimated


def words(text: str) -> list[str]:
    """The stand-in for a model's tokens where no model is at hand."""
    return text.split()


def stretch(text: str, length: int, tokens: Tokens) -> str:
    """Whole words of `text`, repeated as often as need be: as many as `length` tokens hold."""
    pieces = _PIECE.findall(text.strip() + "\n\n")
    needed = _more_than_enough(pieces, length, tokens)
    return shorten("".join(pieces * (needed // len(pieces) + 1)), length, tokens)


def shorten(text: str, length: int, tokens: Tokens, keep_end: bool = False) -> str:
    """The most words from the start (or the end) of `text` that make at most `length` tokens.

    At least one word stays.
    """
    pieces = _PIECE.findall(text)
    most = min(len(pieces), _more_than_enough(pieces, length, tokens))

    def part(count: int) -> str:
        return "".join(pieces[-count:] if keep_end else pieces[:count]).strip()

    count = bisect_right(range(1, most + 1), length, key=lambda count: len(tokens(part(count))))
    return part(max(1, count))


def _more_than_enough(pieces: Sequence[str], length: int, tokens: Tokens) -> int:
    """A number of words that surely makes more than `length` tokens, found on a sample."""
    sample = "".join(pieces[:_SAMPLE])
    per_token = min(len(pieces), _SAMPLE) / max(1, len(tokens(sample)))
    return int(1.5 * length * per_token) + 10
