"""MMLU (Hendrycks et al. 2021): 57 subjects, 14,042 questions; the score is over questions.

Data: test/SUBJECT_test.csv and dev/SUBJECT_dev.csv without header, as in the published data.tar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.eval import data
from nybble.eval.task import Item, Row, Summary, by_subject, percent
from nybble.eval.tasks import choice
from nybble.eval.tasks.exam import Exam, names, question_with_options, read_rows

_SOURCE = data.Source(
    "mmlu",
    "the folder `data` of https://people.eecs.berkeley.edu/~hendrycks/data.tar, unpacked.",
    repo_id="cais/mmlu",
    filename="data.tar",
)
_CARD = (
    "The following is a multiple-choice question. Please choose the most suitable one among "
    "A, B, C and D as the answer to this question."
)
_MODERN = (
    "Answer the following multiple-choice question. Think step by step if that helps, and end "
    'with a line of the form "Answer: X", where X is A, B, C or D.'
)

GROUPS: Mapping[str, Sequence[str]] = {
    "STEM": names(
        "abstract_algebra anatomy astronomy college_biology college_chemistry "
        "college_computer_science college_mathematics college_physics computer_security "
        "conceptual_physics electrical_engineering elementary_mathematics high_school_biology "
        "high_school_chemistry high_school_computer_science high_school_mathematics "
        "high_school_physics high_school_statistics machine_learning"
    ),
    "Humanities": names(
        "formal_logic high_school_european_history high_school_us_history "
        "high_school_world_history international_law jurisprudence logical_fallacies "
        "moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"
    ),
    "Social Sciences": names(
        "econometrics high_school_geography high_school_government_and_politics "
        "high_school_macroeconomics high_school_microeconomics high_school_psychology "
        "human_sexuality professional_psychology public_relations security_studies sociology "
        "us_foreign_policy"
    ),
    "Other": names(
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management "
        "marketing medical_genetics miscellaneous nutrition professional_accounting "
        "professional_medicine virology"
    ),
}


class MMLU(Exam):
    splits = ("test", "val")
    groups = GROUPS
    option_prefix = " "

    def file(self, split: str, subject: str) -> Path:
        name = f"{split}/{subject}_{split}.csv"
        return data.find(_SOURCE, self.settings.data, name, f"data/{name}")

    def read(self, path: Path, answers: bool) -> list[dict[str, str]]:
        return read_rows(path, header=False, answers=True)

    def ask(self, item: Item) -> str:
        head = _CARD if self.settings.card else _MODERN
        return f"{head}\n\n" + question_with_options(item.query, item.fields["options"], "\n")

    def preamble(self, subject: str) -> str:
        about = subject.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {about}.\n\n"

    def raw(self, row: Mapping[str, str], answer: str) -> str:
        options = "".join(f"\n{letter}. {row[letter]}" for letter in choice.LETTERS)
        end = f" {answer}\n\n" if answer else ""
        return f"Question: {row['question']}{options}\nAnswer:{end}"

    def read_answer(self, item: Item, output: str) -> str | None:
        if self.settings.card:
            return choice.english(output, item.fields["options"])
        return choice.final(output, choice.ENGLISH)

    def aggregate(self, rows: Sequence[Row]) -> Summary:
        """Over questions; parts: each category over its questions, then each subject."""
        whole, subjects = super().aggregate(rows), by_subject(rows)
        parts: dict[str, Any] = {}
        for group, members in GROUPS.items():
            if scores := [score for name in members for score in subjects.get(name, ())]:
                parts[group] = percent(scores)
        parts |= {name: percent(scores) for name, scores in subjects.items() if name}
        return Summary(whole.score, whole.n, whole.interval, parts)
