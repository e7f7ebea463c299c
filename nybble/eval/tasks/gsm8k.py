"""GSM8K (Cobbe et al. 2021): 1,319 word problems whose answer is one number.

Data: test.jsonl (and train.jsonl for worked examples), rows {"question", "answer"}, the answer
ending in `#### N`, as published at github.com/openai/grade-school-math.
"""

from __future__ import annotations

import re
from functools import cached_property

from nybble.eval import data
from nybble.eval.task import Item, Prompt, Task

_HINT = (
    "a folder with test.jsonl (and train.jsonl for --shots) from "
    "https://github.com/openai/grade-school-math/tree/master/grade_school_math/data."
)
_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
_NUMBER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# The card's script takes every + or - before a number as its sign: of "60-20" it reads -20.
_CARD = re.compile(rf"[+-]?(?:{_NUMBER})")
_MODERN = re.compile(rf"(?:(?<![\w.])[+-])?(?:{_NUMBER})")
# What is stated may stand below its cue, and either may be bold: "**Answer:**\n\n12".
_CUE = re.compile(r"(?:####|answer(?: is|:))[\s:*]*(.*)", re.IGNORECASE)
_CALCULATION = re.compile(r"<<[^>]*>>")
_TOLERANCE = 1e-4


class GSM8K(Task):
    shots = (0, 4, 8)

    def load(self) -> list[Item]:
        rows = self._rows("test.jsonl")
        return [Item(str(i), question, answer) for i, (question, answer) in enumerate(rows)]

    def _rows(self, file: str) -> list[tuple[str, str]]:
        source = data.Source("gsm8k", _HINT, url=_URL + file)
        rows = data.read_jsonl(
            data.find(source, self.settings.data, file), {"question": str, "answer": str}
        )
        return [(row["question"], row["answer"]) for row in rows]

    def prompt(self, item: Item) -> Prompt:
        chat = not self.settings.base
        stop = () if chat else ("\n\n", "Question:")
        if chat and not self.settings.shots:
            return Prompt(item.query)
        text = f"{self._examples}Question: {item.query}\nLet's think step by step\n"
        return Prompt(text, chat=chat, stop=stop)

    @cached_property
    def _examples(self) -> str:
        """The first problems of the training set, worked."""
        shots = self.settings.shots
        return "".join(
            f"Question: {question}\nLet's think step by step\n{worked(answer)}\n\n"
            for question, answer in (self._rows("train.jsonl")[:shots] if shots else ())
        )

    def extract(self, item: Item, output: str) -> str | None:
        if not self.settings.card:
            return final_number(output)
        return last_digits(output) if self.settings.base else last_number(output)

    def score(self, item: Item, answer: str | None) -> float:
        reference = last_number(item.reference)
        if answer is None or reference is None:
            return 0.0
        return float(abs(float(answer) - float(reference)) <= _TOLERANCE)


def worked(answer: str) -> str:
    """A training answer without its calculator's marks, `#### N` as "The answer is N"."""
    return _CALCULATION.sub("", answer).replace("#### ", "The answer is ")


def last_number(text: str) -> str | None:
    """The card's rule: the last number, commas dropped, sign kept."""
    return _last(_CARD, text)


def last_digits(text: str) -> str | None:
    """The card's rule for base models: the last run of digits; of "1,234.50" it reads 50."""
    found = re.findall("[0-9]+", text)
    return found[-1] if found else None


def final_number(text: str) -> str | None:
    """Today's rule: the number stated after the last "#### " or "answer is", else the last number.

    Stated is what follows the line's last "=", else what stands at once, else the last of the
    line. A minus that stands behind a digit or letter is not a sign.
    """
    for rest in reversed(_CUE.findall(text)):
        first = _MODERN.search(rest.rpartition("=")[2])
        if first and ("=" in rest or not re.search(r"\w", rest[: first.start()])):
            return _plain(first.group())
        if number := _last(_MODERN, rest):
            return number
    return _last(_MODERN, text)


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("+", "")
