"""Text of an answer while it is being generated: whole characters, and stop strings held back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nybble.errors import RequestError
from nybble.tokenizer.base import Tokenizer


class StreamDecoder:
    """Turns one token after another into text, never cutting a character.

    The pieces and `finish()` joined equal `tokenizer.decode(all ids)`, for every input.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.hidden_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        if token in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character was never finished."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Passes text on up to the earliest stop string, holding back only what may become one.

    Where two stop strings overlap, the one that begins first in the whole text wins, even if
    the other is complete sooner; of two that begin together, the one that is complete first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise RequestError("stop must be a list of non-empty texts.")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stop: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that was found or None)."""
        if self.stop is not None:
            return "", self.stop
        self._held += text
        start, stop = self._first_match()
        hope = self._first_hope()
        if stop is not None and start <= hope:
            return self._end(start, stop), stop
        return self._take(hope), None

    def finish(self) -> str:
        """The text that was held back; sets `stop` if a stop string is complete in it."""
        start, stop = self._first_match()
        return self._take(len(self._held)) if stop is None else self._end(start, stop)

    def _first_match(self) -> tuple[int, str | None]:
        """Where the earliest complete stop string begins, and which (the shortest of equals)."""
        found = [(self._held.find(s), len(s), s) for s in self._stops if s in self._held]
        start, _, stop = min(found, default=(len(self._held), 0, None))
        return start, stop

    def _first_hope(self) -> int:
        """Where the earliest unfinished stop string may have begun."""
        end = len(self._held)
        for start in range(max(0, end - self._longest + 1), end):
            if any(s.startswith(self._held[start:]) for s in self._stops):
                return start
        return end

    def _take(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _end(self, start: int, stop: str) -> str:
        text, self._held, self.stop = self._held[:start], "", stop
        return text
