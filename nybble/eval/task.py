"""What a benchmark is: items loaded, prompts made, answers extracted, scored and summed up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nybble.errors import ConfigError
from nybble.eval.statistics import Interval, mean_interval
from nybble.eval.text import Tokens, words

Protocol = Literal["card", "modern"]

# What a row of a file may have besides its query, gt and prediction.
OF_A_ROW: Mapping[str, type | tuple[type, ...]] = {
    "id": (str, int),
    "sample": int,
    "subject": str,
    "fields": dict,
}


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    protocol: "card" repeats what produced the model card's numbers, faults included; "modern"
    does what is done today. base: the model is no chat model (likelihood of the options, raw
    prompts). shots: worked examples before the question. samples: answers to each item (pass@k).
    data: a folder in the benchmark's published layout; None downloads. split, subjects: which
    part of it. lengths (tokens) and depths (per cent): the needle's grid. tokens: cuts a text
    into the model's tokens. context: how many the model takes (None: no bound). unsafe: run
    untrusted code even where it cannot be isolated.
    """

    protocol: Protocol = "card"
    base: bool = False
    shots: int = 0
    samples: int = 1
    data: Path | None = None
    split: str = ""
    subjects: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (1000, 4000, 8000, 16000, 24000, 32000)
    depths: tuple[int, ...] = (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
    tokens: Tokens = words
    context: int | None = None
    unsafe: bool = False

    @property
    def card(self) -> bool:
        return self.protocol == "card"


@dataclass(frozen=True)
class Item:
    """One question. query: as the data has it; fields: what else scoring needs (JSON values)."""

    id: str
    query: str
    reference: str
    subject: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What a model is given. options: pick the likeliest continuation instead of generating.

    chat False: the text is continued as it is. system None: the model's own default.
    """

    text: str
    system: str | None = None
    chat: bool = True
    max_tokens: int = 2048
    stop: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One line of a run's JSONL: an item, what the model made of it, and the verdict."""

    id: str
    sample: int
    subject: str
    query: str
    gt: str
    prompt: str
    prediction: str
    answer: str | None
    score: float
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Summary:
    """Scores are 0 to 100. parts: further numbers of the same rows, in the order to print."""

    score: float
    n: int
    interval: Interval
    parts: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """One benchmark under one protocol. Subclasses are small: everything shared is here."""

    splits: tuple[str, ...] = ("",)
    has_subjects = False
    shots: tuple[int, ...] = (0,)
    packages: tuple[str, ...] = ()  # of the extra `eval`, that scoring needs

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.settings = settings
        if settings.shots not in self.shots:
            allowed = " or ".join(map(str, self.shots))
            raise ConfigError(f"{name} is defined with {allowed} shots: change --shots.")
        if settings.split and settings.split not in self.splits:
            usable = " or ".join(filter(None, self.splits)) or "no --split"
            raise ConfigError(f"{name} has no split {settings.split!r}: use {usable}.")
        if settings.subjects and not self.has_subjects:
            raise ConfigError(f"{name} has no subjects: leave --subjects out.")

    @property
    def split(self) -> str:
        return self.settings.split or self.splits[0]

    @abstractmethod
    def load(self) -> list[Item]:
        """All items; DataError names the file that is missing and how to get it."""

    @abstractmethod
    def prompt(self, item: Item) -> Prompt: ...

    @abstractmethod
    def extract(self, item: Item, output: str) -> str | None:
        """The answer in a model's output; None where there is none."""

    @abstractmethod
    def score(self, item: Item, answer: str | None) -> float:
        """0 to 1."""

    def aggregate(self, rows: Sequence[Row]) -> Summary:
        """The mean over rows, unless the benchmark defines another."""
        scores = [row.score for row in rows]
        return Summary(percent(scores), len(rows), mean_interval(scores))

    def files(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """What else a finished run leaves behind: file name -> content."""
        return {}

    def judge(self, item: Item, output: str, prompt: str = "", sample: int = 0) -> Row:
        answer = self.extract(item, output)
        score = self.score(item, answer)
        return Row(
            item.id,
            sample,
            item.subject,
            item.query,
            item.reference,
            prompt,
            output,
            answer,
            score,
            item.fields,
        )

    def items_of(self, row: Mapping[str, Any], index: int) -> Iterable[tuple[Item, str]]:
        """The items, with their outputs, of one row {"query", "gt", "prediction"} of a file.

        Rows of nybble's own runs carry id, subject and fields besides, and so are scored again.
        """
        item = Item(
            id=str(row.get("id", index)),
            query=row["query"],
            reference=row["gt"],
            subject=row.get("subject", ""),
            fields={**self.fields_of(row), **row.get("fields", {})},
        )
        yield item, row["prediction"]

    def fields_of(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """What scoring needs besides, read from a foreign row."""
        return {}


def percent(scores: Sequence[float]) -> float:
    return 100.0 * sum(scores) / len(scores) if scores else 0.0


def by_subject(rows: Iterable[Row]) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[row.subject].append(row.score)
    return dict(groups)
