"""Texts measured in tokens: cut to a length, or repeated to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Tokens = Callable[[str], Sequence[str]]
"""Cuts a text into the tokens of a model."""

_PIECE = re.compile(r"\S+\s*")
_SAMPLE = 20_000  # characters from which the tokens a word are estimated


def words(text: str) -> list[str]:
    """The stand-in for a model's tokens where no model is at hand."""
    return text.split()


def stretch(text: str, length: int, tokens: Tokens) -> str:
    """Whole words of `text`, repeated as often as need be, of nearly `length` tokens at most."""
    pieces = _PIECE.findall(text.strip() + "\n\n")
    count = _estimate(pieces, length, tokens)
    return shorten("".join(pieces * (count // len(pieces) + 1)).strip(), length, tokens)


def shorten(text: str, length: int, tokens: Tokens, keep_end: bool = False) -> str:
    """The first (or last) whole words of `text` that make at most `length` tokens.

    At least one word stays. Estimated in proportion first, then trimmed until it fits.
    """
    pieces = _PIECE.findall(text)
    count = min(len(pieces), _estimate(pieces, length, tokens))
    while True:
        part = "".join(pieces[-count:] if keep_end else pieces[:count]).strip()
        over = len(tokens(part)) - length
        if over <= 0 or count <= 1:
            return part
        count = max(1, min(count - 1, count * length // (length + over)))


def _estimate(pieces: Sequence[str], length: int, tokens: Tokens) -> int:
    """Somewhat more words than `length` tokens should need."""
    sample = "".join(pieces)[:_SAMPLE]
    per_token = len(_PIECE.findall(sample)) / max(1, len(tokens(sample)))
    return max(1, int(1.1 * length * per_token) + 1)
