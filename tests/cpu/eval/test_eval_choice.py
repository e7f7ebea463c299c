"""Which letter an answer means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.eval.tasks import choice

OPTIONS = dict(zip("ABCD", ("apples", "a pair of pears", "figs", "some dates"), strict=True))
LETTERS = st.sampled_from("ABCD")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("The answer is not A, the answer is B.", "B"),
        ("(C)", "C"),
        ("C. because", "C"),
        ("Both seem fine, but D is correct", "D"),
        ("I would choose B", "B"),
        ("A isn't correct, but C is right.", "C"),
        ("A", "A"),
        ("x A= B", "B"),
    ],
)
def test_english_cases(output, answer):
    assert choice.english(output, OPTIONS) == answer
    assert choice.final(output, choice.ENGLISH) == answer


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("答案是C。", "C"),
        ("A选项不正确，B选项正确", "B"),
        ("我认为应该选择（D）", "D"),
        ("应该选B选项。", "B"),
        ("A不符合题意，而C符合题意", "C"),
        ("D．因为", "D"),
    ],
)
def test_chinese_cases(output, answer):
    assert choice.chinese(output, "问题", OPTIONS) == answer
    assert choice.final(output, choice.CHINESE) == answer


def test_an_options_text_counts_as_its_letter():
    assert choice.english("It must be FIGS", OPTIONS) == "C"
    assert choice.english("The answer is a pair of pears", OPTIONS) == "B"


def test_a_filled_question_counts_as_its_answer():
    question = "关于传输层的面向连接服务的特性是____。"
    options = dict(zip("ABCD", ("既不保证可靠", "不保证可靠", "保证可靠", "都对"), strict=True))
    output = "关于传输层的面向连接服务的特性是不保证可靠"
    assert choice.chinese(output, question, options) == "B"


def test_without_a_letter_the_card_guesses_and_modern_does_not():
    assert choice.english("pair of pear", OPTIONS) == "B"
    assert choice.english("", OPTIONS) == "A"
    assert choice.final("pair of pear", choice.ENGLISH) is None


def test_modern_takes_the_last_stated_answer():
    output = "Answer: A seems right.\nBut B is better.\n**Answer: B**"
    assert choice.final(output, choice.ENGLISH) == "B"
    assert choice.final("先看A。\n答案：C", choice.CHINESE) == "C"


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("A triangle has 3 sides.\nANSWER: B", "B"),
        ("answer: C", "C"),
        ("A cell divides. I cannot decide.", None),
        ("I cannot decide. A cell divides.", None),
        ("A. It divides.", "A"),
        ("A is the one.", "A"),
        ("A\nthe cell divides.", "A"),
        ("A\n\nexplanation: B is wrong because it rains", "A"),
        ("It has to be option A as it divides.", "A"),
        ("A cell divides, so D.", "D"),
    ],
)
def test_modern_cases(output, answer):
    assert choice.final(output, choice.ENGLISH) == answer


@given(LETTERS, st.sampled_from(["The answer is {}.", "{}", "({})", "I choose {}", "{} is right"]))
def test_any_letter_in_any_sentence(letter, sentence):
    assert choice.english(sentence.format(letter), OPTIONS) == letter


@given(LETTERS, LETTERS)
def test_a_denied_letter_is_not_taken(wrong, right):
    if wrong != right:
        output = f"The answer is not {wrong}, the answer is {right}"
        assert choice.english(output, OPTIONS) == right
        assert choice.chinese(f"{wrong}不对，{right}对", "问题", OPTIONS) == right


@given(st.text(max_size=80))
def test_every_text_has_a_reading(output):
    assert choice.english(output, OPTIONS) in "ABCD"
    assert choice.chinese(output, "哪一个是水果____？", OPTIONS) in "ABCD"
    assert choice.final(output, choice.ENGLISH) in (None, *"ABCD")
