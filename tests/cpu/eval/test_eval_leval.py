"""L-Eval's scoring, on rows of the published ChatGPT-3.5-16k predictions and cases of our own."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import RequestError
from nybble.eval.data import DataError
from nybble.eval.runner import score_rows
from nybble.eval.task import Settings
from nybble.eval.tasks.leval import LEval, free_letters, letter_set, math_answer

# (reference, prediction, score): a few of the published rows (but the empty one), long ones cut to
# their end. Over all rows the same code gives the published 63.51 (172 rows), 84.00 (100) and
# 12.22 (90).
COURSERA = [
    ("C", "C", 1),
    ("BD", "B", 0.25),
    ("A", "A. It allows you to revisit and compare different versions of your work.", 1),
    ("ACD", "B. Linear", 0),
    ("AC", "A, C", 0.25),
    ("AC", "A. Encourage change\nC. Help solve problems", 1),
    ("ACD", "A and C", 0.25),
    ("ABC", "ABCD", 0),
    ("ABC", "", 0),
    ("ABD", "A, B, D", 0.25),
]
GSM = [
    ("64", "So he needs to pay 8 * $8 = $64 for the 16 glasses.\nThe answer is $64.", 1),
    ("57500", "Jill's annual salary is $57,500.\nThe answer is $57,500.", 1),
    ("16", "so she will spend 4 * $4.00 = $16.00 on ice cream.\nThe answer is $16.00.", 1),
    ("294", "Therefore, Lloyd makes $294.67 on eggs per week.\nThe answer is $294.67.", 1),
    ("15", "60/3 + 9 = 69/3 liters.\nThe answer is 69/3 liters of water.", 0),
    ("163", "Please double-check the numbers and provide the correct information.", 0),
]
CODE = [
    # Right, but the script looks for "the final output" with a small t, and then for the end.
    (
        "[1 3 5 7 9]",
        "The final output of the code is the array [1, 3, 5, 7, 9]. This is obtained by calling "
        "the function `operation1(1,10,2)`, which generates an array starting from 1, "
        "incrementing by 2, and stopping at 10.",
        0,
    ),
    ("3", "So the final output of the code is `3`.", 1),
    ("[-3  6 -3]", "The final output of the code is:\n\n[-3, 6, -3]", 1),
    ("NLP", 'In this case, the only word is "NLP". Therefore, the final output is "NLP".', 1),
    ("True", "Finally, the code prints the value of `h`.", 0),
]


@pytest.mark.parametrize(
    ("name", "rows"), [("coursera", COURSERA), ("gsm100", GSM), ("codeU", CODE)]
)
def test_published_rows(name, rows):
    task = LEval(f"leval-{name}", Settings())
    foreign = [{"query": "?", "gt": gt, "prediction": text} for gt, text, _ in rows]
    summary, judged = score_rows(task, foreign)
    assert [row.score for row in judged] == [score for _, _, score in rows]
    assert summary.n == len(rows)
    assert summary.score == pytest.approx(100 * sum(s for *_, s in rows) / len(rows))


def test_options_of_quality_and_toefl():
    quality = LEval("leval-quality", Settings())
    foreign = [{"query": "?", "gt": "(B) Their subconscious knew", "prediction": "(B) Their"}]
    assert score_rows(quality, foreign)[0].score == 100
    toefl = LEval("leval-tpo", Settings())
    # The first capital letter anywhere, even in a word.
    foreign = [{"query": "?", "gt": "B", "prediction": "Beavers: D"}]
    assert score_rows(toefl, foreign)[0].score == 100
    modern = LEval("leval-tpo", Settings(protocol="modern"))
    assert score_rows(modern, foreign)[0].score == 0


def test_science_fiction_counts_text_and_world():
    task = LEval("leval-sci_fi", Settings())
    rows = [
        {"query": "?", "gt": "True [fact: False]", "prediction": "True [fact: False]"},
        {"query": "?", "gt": "True [fact: False]", "prediction": "It is false. [fact: false.]"},
        {"query": "?", "gt": "False [fact: True]", "prediction": "no idea [fact: True]"},
    ]
    summary, judged = score_rows(task, rows)
    assert [row.score for row in judged] == [1, 1, 0, 1, 0, 1]
    assert summary.n == 6
    with pytest.raises(RequestError, match="sci_fi rows are written"):
        score_rows(task, [{"query": "?", "gt": "True", "prediction": "True"}])


@given(st.sets(st.sampled_from("ABCD"), min_size=1))
def test_sets_of_letters(letters):
    written = sorted(letters)
    for text in ("".join(written), "".join(f"{letter}. x\n" for letter in written)):
        assert letter_set(text) == "".join(written)
        assert free_letters(text) == "".join(written)
    assert free_letters("".join(written) + ".") == "".join(written)
    assert free_letters(f"The answer is {''.join(written)}.") == "".join(written)
    assert free_letters(", ".join(written)) == "".join(written)
    assert free_letters(" and ".join(written)) == "".join(written)


@given(st.integers(0, 10**9))
def test_whole_numbers(number):
    assert math_answer(f"first 3.\nThe answer is ${number:,}.00.") == str(number)
    assert math_answer(f"It makes 5 and then {number} pieces") == str(number)


# -- loading and prompts -------------------------------------------------------------------------


def write(folder, kind, **changes):
    row = {"input": "one two three four", "instructions": ["Q1", "Q2"], "outputs": ["A", "B"]}
    (folder / f"{kind}.jsonl").write_text(json.dumps(row | changes) + "\n")


def test_prompts(tmp_path):
    write(tmp_path, "quality")
    task = LEval("leval-quality", Settings(data=tmp_path))
    first, second = task.load()
    assert (first.id, second.id, second.reference) == ("0/0", "0/1", "B")
    prompt = task.prompt(first)
    assert prompt.text == (
        "Document is as follows. one two three four \nQuestion: Q1. Please directly give the "
        "answer without any additional output or explanation \nAnswer:"
    )
    assert prompt.max_tokens == 512
    assert "very long document" in prompt.system


def test_base_models_get_everything_as_one_text(tmp_path):
    write(tmp_path, "tpo")
    task = LEval("leval-tpo", Settings(data=tmp_path, base=True))
    prompt = task.prompt(task.load()[0])
    assert not prompt.chat
    assert prompt.text.startswith("Now you are given")
    assert prompt.text.endswith("Answer:")


def test_science_fiction_asks_twice(tmp_path):
    query = "True or False? Answer this question based on the world described in the document."
    write(tmp_path, "sci_fi", instructions=[query], outputs=["True [fact: False]"])
    task = LEval("leval-sci_fi", Settings(data=tmp_path))
    text, world = task.load()
    assert (text.reference, world.reference) == ("True", "False")
    assert "described in the document" in task.prompt(text).text
    assert "real-world knowledge" in task.prompt(world).text


@pytest.mark.parametrize(("kind", "kept"), [("tpo", "w0 "), ("codeU", "w1999")])
def test_long_documents_lose_their_tail_and_code_its_head(tmp_path, kind, kept):
    document = " ".join(f"w{i}" for i in range(2000))
    write(tmp_path, kind, input=document)
    task = LEval(f"leval-{kind}", Settings(data=tmp_path, context=1200))
    text = task.prompt(task.load()[0]).text
    assert kept in text
    assert 400 < len(text.split()) < 700


def test_malformed_rows(tmp_path):
    write(tmp_path, "tpo", outputs=["A"])
    with pytest.raises(DataError, match="as many outputs as instructions"):
        LEval("leval-tpo", Settings(data=tmp_path)).load()
