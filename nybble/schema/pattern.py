"""Which patterns (regular expressions) can be enforced inside a JSON string."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from nybble.errors import RequestError

# A pattern's length, as it stands and with its repeats written out: that takes time to compile.
MAX_PATTERN, MAX_EXPANDED = 500, 128

_PIECE = re.compile(
    r"(?P<class>\[\^?(?:\\.|[^\\\]])+\])|(?P<repeat>\{[\d,]+\})|(?P<group>\((?:\?.?)?)"
    r"|(?P<escape>\\(?:u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.))|(?P<character>.)",
    re.DOTALL,
)
_CLASSES = "dDwWsS"
# What no JSON string holds as it is. A grammar that has nothing else to offer would offer it.
_ESCAPED_IN_JSON = frozenset('"\\') | frozenset(map(chr, range(0x20)))


def check_pattern(pattern: object, where: str) -> None:
    """RequestError unless the pattern can be enforced.

    It stands for the whole string, with or without anchors, and for strings that need no escapes
    in JSON.
    """
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
        raise RequestError(f"{where}: give a pattern of 1 to {MAX_PATTERN} characters.")
    pieces = [(match.lastgroup or "", match[0]) for match in _PIECE.finditer(pattern)]
    for piece in _refused(pieces):
        raise RequestError(
            f"{where}: {piece!r} cannot be enforced there; use classes, groups, alternatives, "
            "repeats, anchors at both ends, and characters that need no escape in JSON."
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise RequestError(f"{where} is no pattern ({error}): repair it.") from error
    if _expanded(pieces) > MAX_EXPANDED:
        raise RequestError(
            f"{where} is longer than {MAX_EXPANDED} characters when its repeats are written out: "
            "repeat less, or without a limit (* or +)."
        )


def expanded(pattern: str) -> int:
    """The length of a pattern that has been checked, with its repeats written out."""
    return _expanded([(match.lastgroup or "", match[0]) for match in _PIECE.finditer(pattern)])


def _refused(pieces: Sequence[tuple[str, str]]) -> Iterator[str]:
    for index, (kind, piece) in enumerate(pieces):
        match kind:
            case "class":
                good = _plain_class(piece)
            case "group":
                good = piece in ("(", "(?:")
            case "escape":
                good = piece[1:] in _CLASSES or _meant(piece) not in _ESCAPED_IN_JSON
            case "character":
                edge = {"^": index == 0, "$": index == len(pieces) - 1}
                good = edge.get(piece, piece not in "[]{}" and piece not in _ESCAPED_IN_JSON)
                # Possessive repeats are Python's own.
                good = good and not (piece == "+" and _repeats(pieces[index - 1]))
            case _:
                good = True
        if not good:
            yield piece


def _repeats(piece: tuple[str, str]) -> bool:
    return piece[0] == "repeat" or piece in (("character", c) for c in "*+?")


def _plain_class(piece: str) -> bool:
    """Whether the class offers nothing that needs an escape; ruling it out is welcome."""
    negated = piece.startswith("[^")
    for match in _PIECE.finditer(piece[2 if negated else 1 : -1]):
        character = _meant(match[0]) if match.lastgroup == "escape" else match[0]
        if match[0][1:] in _CLASSES and match.lastgroup == "escape":
            continue
        if character in "[\0" or (character in _ESCAPED_IN_JSON and not negated):
            return False
    return True


def _meant(escape: str) -> str:
    """The character that an escape stands for; NUL for what is none, or of no use here."""
    if len(escape) > 2:
        return chr(int(escape[2:], 16))
    return "\0" if escape[1].isalnum() else escape[1]


def _expanded(pieces: Sequence[tuple[str, str]]) -> int:
    """How many characters and classes a pattern has when counted repeats are written out."""
    groups, last = [0], 0
    for kind, piece in pieces:
        if kind == "group":
            groups.append(0)
        elif piece == ")":
            last = groups.pop()
            groups[-1] += last
        elif kind == "repeat":
            numbers = [int(number) for number in re.findall(r"\d+", piece)]
            groups[-1] += last * (max(numbers, default=1) - 1)
        elif piece not in ("*", "+", "?", "|", "^", "$"):
            last = 1
            groups[-1] += last
    return sum(groups)
