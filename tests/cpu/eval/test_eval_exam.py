"""MMLU and C-Eval: files, prompts, and how scores are averaged."""

from __future__ import annotations

import json

import pytest
from eval_mocks import Mock

from nybble.errors import ConfigError
from nybble.eval.data import DataError
from nybble.eval.runner import RunFolder, run_task, score_rows
from nybble.eval.task import Settings
from nybble.eval.tasks.ceval import CEval
from nybble.eval.tasks.mmlu import MMLU


@pytest.fixture
def mmlu(tmp_path):
    """Astronomy: 1 question (B); marketing: 3 (A, A, D); five worked examples each."""
    tmp_path = tmp_path / "mmlu"
    for split, rows in (("test", {"astronomy": "B", "marketing": "AAD"}), ("dev", {})):
        (tmp_path / split).mkdir(parents=True)
        for subject in ("astronomy", "marketing"):
            answers = rows.get(subject, "ABCDA")
            lines = '"Which, ""of these""?",one,two,three,four,{}\n'
            (tmp_path / split / f"{subject}_{split}.csv").write_text(
                "".join(lines.format(answer) for answer in answers)
            )
    return tmp_path


@pytest.fixture
def ceval(tmp_path):
    tmp_path = tmp_path / "ceval"
    head = "id,question,A,B,C,D,answer\n"
    rows = {"val": {"logic": "BB", "law": "ACDA"}, "dev": {"logic": "ABCDA", "law": "ABCDA"}}
    for split, subjects in rows.items():
        (tmp_path / split).mkdir(parents=True)
        for subject, answers in subjects.items():
            lines = [f"{i},哪个____？,甲,乙,丙,丁,{answer}\n" for i, answer in enumerate(answers)]
            (tmp_path / split / f"{subject}_{split}.csv").write_text(head + "".join(lines))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "law_test.csv").write_text("id,question,A,B,C,D\n0,哪个？,甲,乙,丙,丁\n")
    return tmp_path


def settings(folder, **changes):
    subjects = changes.pop("subjects", ("astronomy", "marketing"))
    return Settings(data=folder, subjects=subjects, **changes)


def test_mmlu_prompt_of_the_card(mmlu):
    task = MMLU("mmlu", settings(mmlu))
    assert task.prompt(task.load()[0]).text == (
        "The following is a multiple-choice question. Please choose the most suitable one among "
        "A, B, C and D as the answer to this question.\n\n"
        'Which, "of these"?\nA. one\nB. two\nC. three\nD. four\n'
    )


def test_mmlu_five_shots_and_base(mmlu):
    task = MMLU("mmlu", settings(mmlu, shots=5, base=True))
    prompt = task.prompt(task.load()[0])
    assert prompt.text.startswith(
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        'Question: Which, "of these"?\nA. one\nB. two\nC. three\nD. four\nAnswer: A\n\nQuestion: '
    )
    assert prompt.text.endswith("D. four\nAnswer:")
    assert prompt.text.count("Answer:") == 6
    assert prompt.options == (" A", " B", " C", " D")


def test_mmlu_averages_over_questions(mmlu, tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    summary = run_task(MMLU("mmlu", settings(mmlu)), Mock(lambda _: "The answer is A."), folder)
    assert (summary.score, summary.n, summary.interval.method) == (50, 4, "Wilson")
    assert summary.parts == pytest.approx(
        {"STEM": 0, "Other": 200 / 3, "astronomy": 0, "marketing": 200 / 3}
    )


def test_base_models_choose_the_likeliest_letter(mmlu, tmp_path):
    task = MMLU("mmlu", settings(mmlu, base=True))
    summary = run_task(task, Mock(lambda _: "A"), RunFolder(tmp_path / "run", {}))
    assert summary.score == 50


def test_ceval_prompts(ceval):
    task = CEval("ceval", settings(ceval, subjects=("logic",)))
    assert task.prompt(task.load()[0]).text == "哪个____？\n\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n"
    shots = CEval("ceval", settings(ceval, subjects=("logic",), shots=5, base=True))
    prompt = shots.prompt(shots.load()[0])
    assert prompt.text.startswith("问题：哪个____？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：A\n\n")
    assert prompt.text.endswith("\n答案：")
    assert prompt.options == tuple("ABCD")


def test_ceval_averages_over_subjects(ceval, tmp_path):
    task = CEval("ceval", settings(ceval, subjects=("logic", "law")))
    summary = run_task(task, Mock(lambda _: "答案是A。"), RunFolder(tmp_path / "run", {}))
    assert summary.score == 25  # (0 + 50) / 2, not 2 / 6
    assert summary.parts == {"Humanities": 25, "logic": 0, "law": 50}
    assert summary.interval.method == "Wilson over the questions"  # two subjects of few


def test_ceval_test_set_becomes_a_submission(ceval, tmp_path):
    task = CEval("ceval", settings(ceval, subjects=("law",), split="test"))
    run_task(task, Mock(lambda _: "选C。"), RunFolder(tmp_path / "run", {}))
    submission = json.loads((tmp_path / "run" / "ceval-submission.json").read_text())
    assert submission == {"law": {"0": "C"}}


def test_modern_prompts_ask_for_a_last_line(mmlu, ceval):
    exam = MMLU("mmlu", settings(mmlu, protocol="modern"))
    assert '"Answer: X"' in exam.prompt(exam.load()[0]).text
    exam = CEval("ceval", settings(ceval, subjects=("law",), protocol="modern"))
    item = exam.load()[0]
    assert "答案：X" in exam.prompt(item).text
    assert exam.judge(item, "不知道").answer is None


def test_subjects_may_be_categories(mmlu):
    assert "marketing" in MMLU("mmlu", Settings(subjects=("Other",))).subjects
    assert len(MMLU("mmlu", Settings()).subjects) == 57
    assert len(CEval("ceval", Settings()).subjects) == 52
    with pytest.raises(ConfigError, match=r"no subject 'cooking'.*STEM"):
        MMLU("mmlu", settings(mmlu, subjects=("cooking",))).load()


def test_foreign_rows_carry_their_options_in_the_query():
    query = "Which?\nA. red\nB. green\nC. blue\nD. pink"
    rows = [
        {"query": query, "gt": "C", "prediction": "It is blue"},
        {"query": "Which?", "A": "x", "B": "yy", "C": "z", "D": "w", "gt": "B", "prediction": "yy"},
    ]
    assert score_rows(MMLU("mmlu", Settings()), rows)[0].score == 100


def test_files_that_are_missing_or_wrong(mmlu):
    with pytest.raises(DataError, match=r"test/anatomy_test\.csv.*data\.tar"):
        MMLU("mmlu", settings(mmlu, subjects=("anatomy",))).load()
    (mmlu / "test" / "astronomy_test.csv").write_text("q,a,b\n")
    with pytest.raises(DataError, match="row 1: 3 columns where 6 belong"):
        MMLU("mmlu", settings(mmlu)).load()
