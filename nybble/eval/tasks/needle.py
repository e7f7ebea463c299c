"""A needle in a haystack (after G. Kamradt): one sentence hidden at a depth of a long text.

Data: a folder of .txt files, or one file; without --data the prose that comes with nybble. A text
that is shorter than the longest haystack is repeated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from importlib import resources
from typing import Any

from nybble.errors import ConfigError, RequestError
from nybble.eval.data import DataError
from nybble.eval.task import Item, Prompt, Row, Summary, Task, percent
from nybble.eval.text import stretch, words

NEEDLE = (
    "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny "
    "day."
)
QUESTION = "What is the best thing to do in San Francisco?"
FACTS = ("eat", "sandwich", "sit", "dolores", "park", "sunny", "day")
_ASK = (
    "{}\n\nAnswer the question from the text above only, and do not add anything that is not in "
    f"it.\nQuestion: {QUESTION}"
)
_MAX_NEW_TOKENS = 100
_ROOM = 200  # tokens for the answer and the chat's own marks
_SENTENCE_END = re.compile(r"[.!?。！？][\"')\]]*\s+")


class Needle(Task):
    """Items are the cells of a grid: lengths in tokens x depths in per cent."""

    def load(self) -> list[Item]:
        for depth in self.settings.depths:
            if not 0 <= depth <= 100:
                raise ConfigError(f"--depths has {depth}: use per cents, 0 to 100.")
        self._check_lengths()
        self._text, self._haystacks = self._haystack(), dict[int, str]()
        text = blake2b(self._text.encode(), digest_size=8).hexdigest()
        counted = "words" if self.settings.tokens is words else "tokens"
        shared = {"text": text, "unit": counted}
        return [
            Item(f"{length}/{depth}", QUESTION, NEEDLE, str(length), {"depth": depth, **shared})
            for length in self.settings.lengths
            for depth in self.settings.depths
        ]

    def _check_lengths(self) -> None:
        context = self.settings.context
        longest = max(self.settings.lengths)
        question = len(self.settings.tokens(_ASK.format(NEEDLE)))
        if (shortest := min(self.settings.lengths)) <= question:
            raise ConfigError(f"--lengths has {shortest}: the question alone needs {question}.")
        if context is not None and longest + _ROOM > context:
            raise ConfigError(
                f"--lengths has {longest} and the model's context is {context}: "
                f"stay below {context - _ROOM + 1}, or raise --max-context if the model allows it."
            )

    def _haystack(self) -> str:
        path = self.settings.data
        if path is None:
            return resources.files("nybble.gptq").joinpath("calibration.txt").read_text("utf-8")
        path = path.expanduser()
        files = [path] if path.is_file() else sorted(path.glob("**/*.txt"))
        try:
            text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"A text under {path} cannot be read: {error}.") from error
        if not text.strip():
            raise DataError(f"{path} has no .txt file with text: give --data a folder of them.")
        return text

    def prompt(self, item: Item) -> Prompt:
        length, depth = int(item.subject), int(item.fields["depth"])
        room = length - len(self.settings.tokens(_ASK.format(NEEDLE)))
        if room not in self._haystacks:
            self._haystacks[room] = stretch(self._text, room, self.settings.tokens)
        text = hide(self._haystacks[room], NEEDLE, depth)
        if self.settings.base:
            return Prompt(f"{_ASK.format(text)}\nAnswer:", chat=False, max_tokens=_MAX_NEW_TOKENS)
        return Prompt(_ASK.format(text), max_tokens=_MAX_NEW_TOKENS)

    def extract(self, item: Item, output: str) -> str | None:
        return output.strip() or None

    def score(self, item: Item, answer: str | None) -> float:
        """The share of the needle's facts among the answer's words."""
        found = set(re.findall(r"[a-z]+", (answer or "").lower()))
        return sum(fact in found for fact in FACTS) / len(FACTS)

    def fields_of(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if not row.get("subject", "").isdecimal():
            raise RequestError(
                "A row of the needle must have its length as `subject`: score rows of nybble's "
                "own runs."
            )
        return {}

    def aggregate(self, rows: Sequence[Row]) -> Summary:
        whole = super().aggregate(rows)
        lengths = sorted({int(row.subject) for row in rows})
        parts = {
            f"{length} {unit(rows)}": percent(
                [row.score for row in rows if int(row.subject) == length]
            )
            for length in lengths
        }
        return Summary(whole.score, whole.n, whole.interval, parts)


def unit(rows: Sequence[Row]) -> str:
    """What the lengths count: tokens, or words where the tokens of a model were not known."""
    return str(rows[0].fields.get("unit", "tokens")) if rows else "tokens"


def hide(text: str, needle: str, depth: int) -> str:
    """Put the needle at the sentence's end nearest before the depth; 0 and 100 are the edges."""
    if depth == 0:
        return f"{needle} {text}"
    if depth == 100:
        return f"{text.rstrip()} {needle}"
    ends = [match.end() for match in _SENTENCE_END.finditer(text, 0, len(text) * depth // 100)]
    place = ends[-1] if ends else 0
    return f"{text[:place]}{needle} {text[place:]}"
