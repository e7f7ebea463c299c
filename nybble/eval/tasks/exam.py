"""What MMLU and C-Eval share: rows of a question with options A to D, grouped by subject."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.errors import ConfigError
from nybble.eval import data
from nybble.eval.task import Item, Prompt, Settings, Task
from nybble.eval.tasks import choice

COLUMNS = ("question", *choice.LETTERS, "answer")
_OPTION = re.compile(r"^([A-D])[.．]\s?(.*)$", re.MULTILINE)


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


class Exam(Task):
    """Subclasses say where the files are, how a question is put, and how scores are averaged.

    groups: category -> subjects. option_prefix: what stands before a letter whose likelihood
    a base model is asked for.
    """

    groups: Mapping[str, Sequence[str]]
    option_prefix: str
    shots = (0, 5)
    has_subjects = True
    packages = ("rapidfuzz",)

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self.subjects = self._subjects()

    @abstractmethod
    def file(self, split: str, subject: str) -> Path: ...

    @abstractmethod
    def read(self, path: Path, answers: bool) -> list[dict[str, str]]:
        """Rows with the columns above."""

    @abstractmethod
    def ask(self, item: Item) -> str:
        """The question as a chat message."""

    @abstractmethod
    def raw(self, row: Mapping[str, str], answer: str) -> str:
        """The question as plain text with its answer, or without ("")."""

    # -- loading -----------------------------------------------------------------------------

    def _subjects(self) -> list[str]:
        known = [subject for group in self.groups.values() for subject in group]
        wanted = self.settings.subjects
        for subject in wanted:
            if subject not in known and subject not in self.groups:
                raise ConfigError(
                    f"{self.name} has no subject {subject!r}: use {', '.join(self.groups)}, "
                    f"or subjects such as {known[0]} and {known[-1]}."
                )
        if not wanted:
            return known
        of = {subject: group for group, members in self.groups.items() for subject in members}
        return [subject for subject in known if subject in wanted or of[subject] in wanted]

    def load(self) -> list[Item]:
        return [item for subject in self.subjects for item in self._subject(subject)]

    def _subject(self, subject: str) -> Iterable[Item]:
        path = self.file(self.split, subject)
        for index, row in enumerate(self.read(path, answers=self.split != "test")):
            fields = {"options": {letter: row[letter] for letter in choice.LETTERS}}
            yield Item(
                f"{subject}/{index}", row["question"], row.get("answer", ""), subject, fields
            )

    def _examples(self, subject: str) -> list[dict[str, str]]:
        if not self.settings.shots:
            return []
        rows = self.read(self.file("dev", subject), answers=True)
        return rows[: self.settings.shots]

    # -- prompts -----------------------------------------------------------------------------

    def prompt(self, item: Item) -> Prompt:
        if self.settings.base:
            options = tuple(self.option_prefix + letter for letter in choice.LETTERS)
            return Prompt(self._plain(item), chat=False, options=options)
        if not self.settings.shots:
            return Prompt(self.ask(item))
        return Prompt(self._plain(item))

    def _plain(self, item: Item) -> str:
        row = {"question": item.query, **item.fields["options"]}
        worked = [self.raw(example, example["answer"]) for example in self._examples(item.subject)]
        return self.preamble(item.subject) + "".join(worked) + self.raw(row, "")

    def preamble(self, subject: str) -> str:
        return ""

    # -- scoring -----------------------------------------------------------------------------

    def extract(self, item: Item, output: str) -> str | None:
        if self.settings.base:
            return output.strip() or None
        return self.read_answer(item, output)

    @abstractmethod
    def read_answer(self, item: Item, output: str) -> str | None: ...

    def score(self, item: Item, answer: str | None) -> float:
        return float(answer is not None and answer == item.reference.strip())

    def fields_of(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A foreign row has its options in the query, one a line, or as fields A to D."""
        if all(letter in row for letter in choice.LETTERS):
            return {"options": {letter: str(row[letter]) for letter in choice.LETTERS}}
        found = dict(_OPTION.findall(row["query"]))
        return {"options": {letter: found.get(letter, "") for letter in choice.LETTERS}}


def question_with_options(question: str, options: Mapping[str, str], gap: str) -> str:
    lines = "".join(f"{letter}. {options[letter]}\n" for letter in choice.LETTERS)
    return f"{question}{gap}{lines}"


def read_rows(path: Path, header: bool, answers: bool) -> list[dict[str, str]]:
    return data.read_csv(path, COLUMNS if answers else COLUMNS[:-1], header)
