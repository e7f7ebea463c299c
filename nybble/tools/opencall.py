"""The arguments of a call while they come: where the JSON object ends, and whether it is one."""

from __future__ import annotations

from nybble.tools.base import CallEnd, is_object

# What a JSON object may hold outside its strings.
_OUTSIDE = frozenset(' \t\r\n{}[]:,"-+.0123456789eEtrufalsn')


class OpenCall:
    """A call whose name is known. raw: the text that it is made of so far."""

    def __init__(self, index: int, raw: str) -> None:
        self.index = index
        self.closed = False  # whether the arguments have ended
        self.broken = False  # whether that is because they are no JSON
        self._raw = raw
        self._arguments = ""
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> tuple[str, str]:
        """(what belongs to the arguments, what comes after them)."""
        end = self._end(text)
        piece = text[:end]
        self._arguments += piece
        self._raw += piece
        return piece, text[end:]

    def note(self, text: str) -> None:
        """Text of the call that belongs to no argument."""
        self._raw += text

    def end(self) -> CallEnd:
        return CallEnd(self.index, self._raw, is_object(self._arguments))

    def _end(self, text: str) -> int:
        for index, character in enumerate(text):
            if self.closed:
                return index
            if self._in_string:
                self._inside(character)
            elif character not in _OUTSIDE:
                self.closed = self.broken = True
                return index
            else:
                self._outside(character)
        return len(text)

    def _inside(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False

    def _outside(self, character: str) -> None:
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.closed = self._depth == 0
