"""Numbers in answers, and GSM8K's rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import ConfigError
from nybble.eval.data import DataError
from nybble.eval.task import Item, Settings
from nybble.eval.tasks import make_task
from nybble.eval.tasks.gsm8k import GSM8K, final_number, last_number, worked

DATA = Path(__file__).parents[2] / "data" / "eval"


@pytest.fixture
def folder(tmp_path):
    shutil.copy(DATA / "gsm8k-test.jsonl", tmp_path / "test.jsonl")
    shutil.copy(DATA / "gsm8k-test.jsonl", tmp_path / "train.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,234.50 dollars", "1234.50"),
        ("-3 degrees", "-3"),
        ("$18", "18"),
        ("no number", None),
        ("It is 5.", "5"),
        ("+7%", "7"),
        (".5 of it", ".5"),
        ("in 1,2345 ways", "2345"),
    ],
)
def test_cases(text, number):
    assert last_number(text) == number
    assert final_number(text) == number


def test_a_minus_between_numbers():
    """The card's script reads it as a sign; today it is none."""
    assert last_number("He has 60-20") == "-20"
    assert final_number("He has 60-20") == "20"


def test_the_cards_script_for_base_models_breaks_numbers():
    item = Item("0", "?", "#### 1234")
    text = "The answer is 1,234.00"
    for protocol, base, answer in (("card", True, "00"), ("card", False, "1234.00")):
        task = GSM8K("gsm8k", Settings(protocol=protocol, base=base))
        assert task.judge(item, text).answer == answer
    assert GSM8K("gsm8k", Settings(protocol="modern", base=True)).judge(item, text).score == 1


def test_today_a_stated_answer_wins_over_later_numbers():
    text = "The answer is 12 apples, out of 30.\nThat took me 2 steps."
    assert (last_number(text), final_number(text)) == ("2", "12")
    assert final_number("#### -1,000\n") == "-1000"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 20 - 12 = 8 apples", "8"),
        ("The answer is 20 - 12 = 8 apples, in 3 days.", "8"),
        ("The answer is: in 3 days she earns $60.", "60"),
        ("Answer: \n\n12\n\nIn 3 steps", "12"),
        ("**Answer:**\n\n**12**\n\nIn 3 steps", "12"),
        ("The answer is:\n\n$12, in 3 steps", "12"),
        ("ANSWER: -7, not 8", "-7"),
        ("The answer is known.\n#### 5", "5"),
        ("#### 5\nThe answer is known.", "5"),
    ],
)
def test_a_stated_answer_is_the_result_of_its_line(text, number):
    assert final_number(text) == number


@given(st.integers(-(10**12), 10**12), st.integers(0, 99))
def test_numbers_are_read_as_they_are_written(whole, cents):
    text = f"Therefore the result is {whole:,}.{cents:02d} metres."
    assert float(last_number(text)) == float(f"{whole}.{cents:02d}")
    assert float(final_number(text)) == float(f"{whole}.{cents:02d}")


@given(st.text())
def test_what_is_read_is_a_number(text):
    for read in (last_number, final_number):
        number = read(text)
        assert number is None or float(number) == float(number)


@pytest.mark.parametrize("protocol", ["card", "modern"])
def test_reference_answers_are_right(folder, protocol):
    task = GSM8K("gsm8k", Settings(data=folder, protocol=protocol))
    rows = [task.judge(item, item.reference) for item in task.load()]
    assert task.aggregate(rows).score == 100
    wrong = [task.judge(item, "The answer is 123456.") for item in task.load()]
    assert task.aggregate(wrong).score == 0


def test_prompts(folder):
    task = GSM8K("gsm8k", Settings(data=folder))
    item = task.load()[0]
    assert task.prompt(item).text == item.query
    shots = GSM8K("gsm8k", Settings(data=folder, shots=4))
    text = shots.prompt(item).text
    assert text.count("Question: ") == 5
    assert text.count("Let's think step by step\n") == 5
    assert text.count("The answer is ") == 4
    assert "<<" not in text
    assert "####" not in text
    base = GSM8K("gsm8k", Settings(data=folder, base=True))
    assert not base.prompt(item).chat
    assert base.prompt(item).stop


def test_worked_answers_lose_the_calculators_marks():
    assert worked("2+2=<<2+2=4>>4\n#### 4") == "2+2=4\nThe answer is 4"


def test_refusals(tmp_path, folder):
    with pytest.raises(ConfigError, match="0 or 4 or 8 shots"):
        GSM8K("gsm8k", Settings(shots=3))
    with pytest.raises(ConfigError, match="no split"):
        GSM8K("gsm8k", Settings(split="val"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no test\.jsonl.*github"):
        GSM8K("gsm8k", Settings(data=tmp_path / "empty")).load()
    (folder / "test.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(DataError, match=r"line 1: 'answer' must be there"):
        GSM8K("gsm8k", Settings(data=folder)).load()


def test_names(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    shutil.copy(DATA / "gsm8k-test.jsonl", tmp_path / "gsm8k" / "test.jsonl")
    assert len(make_task("GSM8K", Settings(data=tmp_path)).load()) == 6
    assert make_task("leval-GSM", Settings()).name == "leval-gsm100"
    with pytest.raises(ConfigError, match="did you mean gsm8k"):
        make_task("gsm9k", Settings())
