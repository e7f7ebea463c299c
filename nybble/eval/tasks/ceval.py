"""C-Eval (Huang et al. 2023): 52 subjects in Chinese; the score is the mean of the subjects'.

Data: val/SUBJECT_val.csv, dev/SUBJECT_dev.csv and test/SUBJECT_test.csv with a header, as in the
published ceval-exam.zip. The test set has no answers: its rows become a submission file.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from nybble.eval import data
from nybble.eval.statistics import bootstrap
from nybble.eval.task import Item, Row, Summary, by_subject, percent
from nybble.eval.tasks import choice
from nybble.eval.tasks.exam import Exam, names, question_with_options, read_rows

_SOURCE = data.Source(
    "ceval",
    "the unpacked ceval-exam.zip of https://huggingface.co/datasets/ceval/ceval-exam.",
    repo_id="ceval/ceval-exam",
    filename="ceval-exam.zip",
)
_MODERN = "请回答下面的单项选择题。可以先分析，最后一行写“答案：X”，X 是 A、B、C、D 之一。\n\n"

GROUPS: Mapping[str, Sequence[str]] = {
    "STEM": names(
        "computer_network operating_system computer_architecture college_programming "
        "college_physics college_chemistry advanced_mathematics probability_and_statistics "
        "discrete_mathematics electrical_engineer metrology_engineer high_school_mathematics "
        "high_school_physics high_school_chemistry high_school_biology middle_school_mathematics "
        "middle_school_biology middle_school_physics middle_school_chemistry veterinary_medicine"
    ),
    "Social Sciences": names(
        "college_economics business_administration marxism mao_zedong_thought education_science "
        "teacher_qualification high_school_politics high_school_geography middle_school_politics "
        "middle_school_geography"
    ),
    "Humanities": names(
        "modern_chinese_history ideological_and_moral_cultivation logic law "
        "chinese_language_and_literature art_studies professional_tour_guide legal_professional "
        "high_school_chinese high_school_history middle_school_history"
    ),
    "Others": names(
        "civil_servant sports_science plant_protection basic_medicine clinical_medicine "
        "urban_and_rural_planner accountant fire_engineer "
        "environmental_impact_assessment_engineer tax_accountant physician"
    ),
}
HARD = names(
    "advanced_mathematics discrete_mathematics probability_and_statistics college_physics "
    "college_chemistry high_school_mathematics high_school_physics high_school_chemistry"
)


class CEval(Exam):
    splits = ("val", "test")
    groups = GROUPS
    option_prefix = ""

    def file(self, split: str, subject: str) -> Path:
        return data.find(_SOURCE, self.settings.data, f"{split}/{subject}_{split}.csv")

    def read(self, path: Path, answers: bool) -> list[dict[str, str]]:
        return read_rows(path, header=True, answers=answers)

    def ask(self, item: Item) -> str:
        head = "" if self.settings.card else _MODERN
        return head + question_with_options(item.query, item.fields["options"], "\n\n")

    def raw(self, row: Mapping[str, str], answer: str) -> str:
        options = "".join(f"\n{letter}. {row[letter]}" for letter in choice.LETTERS)
        end = f"{answer}\n\n" if answer else ""
        return f"问题：{row['question']}{options}\n答案：{end}"

    def read_answer(self, item: Item, output: str) -> str | None:
        if self.settings.card:
            return choice.chinese(output, item.query, item.fields["options"])
        return choice.final(output, choice.CHINESE)

    def aggregate(self, rows: Sequence[Row]) -> Summary:
        """The mean over subjects; parts: each category, the Hard subset, then each subject."""
        subjects = {name: percent(scores) for name, scores in by_subject(rows).items()}
        interval = bootstrap(list(by_subject(rows).values()))
        parts: dict[str, float] = {}
        for group, members in {**GROUPS, "Hard": HARD}.items():
            if found := [subjects[name] for name in members if name in subjects]:
                parts[group] = sum(found) / len(found)
        parts |= {name: value for name, value in subjects.items() if name}
        score = sum(subjects.values()) / len(subjects) if subjects else 0.0
        return Summary(score, len(rows), interval, parts)

    def files(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Of the test set the file that the benchmark's site takes: {subject: {"0": "A", ...}}."""
        if self.split != "test":
            return {}
        answers: dict[str, dict[str, str]] = defaultdict(dict)
        for row in rows:
            answers[row.subject][row.id.rsplit("/", 1)[-1]] = row.answer or ""
        content = json.dumps(answers, ensure_ascii=False, indent=1) + "\n"
        return {"ceval-submission.json": content}
