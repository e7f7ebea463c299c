"""The needle: found by a model that searches its prompt, lost by one that forgets."""

from __future__ import annotations

import pytest
from eval_mocks import Mock, forgetful, searcher
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import ConfigError
from nybble.eval.data import DataError
from nybble.eval.runner import RunFolder, run_task
from nybble.eval.task import Settings
from nybble.eval.tasks.needle import NEEDLE, Needle, hide
from nybble.eval.text import shorten, stretch, words

DEPTHS = (0, 25, 50, 75, 100)


def needle(answerer, **changes):
    options = {"lengths": (300, 1000, 2000), "depths": DEPTHS, "tokens": answerer.tokens}
    return Needle("needle", Settings(**(options | changes)))


def test_a_retriever_finds_every_needle(tmp_path):
    answerer = Mock(searcher)
    summary = run_task(needle(answerer), answerer, RunFolder(tmp_path, {}))
    assert (summary.score, summary.n) == (100, 15)
    assert summary.parts == {"300 tokens": 100, "1000 tokens": 100, "2000 tokens": 100}


def test_a_model_that_forgets_loses_the_early_ones(tmp_path):
    answerer = Mock(forgetful(1500))
    task, folder = needle(answerer), RunFolder(tmp_path, {})
    summary = run_task(task, answerer, folder)
    scores = {key[0]: row.score for key, row in folder.rows("needle").items()}
    assert summary.parts["300 tokens"] == 100
    assert scores["2000/100"] == 1
    assert all(scores[f"2000/{depth}"] < 0.5 for depth in (0, 25, 50))
    assert summary.score < 80


def test_a_needle_found_in_one_text_is_not_found_in_another(tmp_path):
    for number, text in enumerate(("Here is one. ", "Here is two. ")):
        (tmp_path / f"{number}.txt").write_text(text * 50)
    answerer = Mock(searcher)
    first, second = (needle(answerer, data=tmp_path / name) for name in ("0.txt", "1.txt"))
    run_task(first, answerer, RunFolder(tmp_path / "run", {}))
    with pytest.raises(ConfigError, match="other questions"):
        run_task(second, answerer, RunFolder(tmp_path / "run", {}))


def test_prompts_have_the_length_and_the_needle_its_depth():
    answerer = Mock()
    task = needle(answerer)
    for item in task.load():
        text = task.prompt(item).text
        length, depth = map(int, item.id.split("/"))
        assert length - 10 <= len(answerer.tokens(text)) <= length + 1
        context = text.rpartition("\n\nAnswer the question")[0]
        assert context.count(NEEDLE) == 1
        place = context.index(NEEDLE) / max(1, len(context) - len(NEEDLE))
        assert abs(100 * place - depth) < (35 if length == 300 else 12)


def test_scores_are_the_share_of_facts():
    task = needle(Mock())
    item = task.load()[0]
    assert task.judge(item, NEEDLE).score == 1
    assert task.judge(item, "Eat a sandwich in the park.").score == pytest.approx(3 / 7)
    assert task.judge(item, "").score == 0
    base = needle(Mock(), base=True)
    assert base.prompt(base.load()[0]).text.endswith("San Francisco?\nAnswer:")


@given(st.text(min_size=1), st.integers(0, 100))
def test_hiding_adds_the_needle_only(text, depth):
    hidden = hide(text, "NEEDLE.", depth)
    place = hidden.index("NEEDLE.")
    rest = hidden[:place] + hidden[place + len("NEEDLE.") :].removeprefix(" ")
    assert rest.split() == text.split()


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["a", "bb", "c c", "d\n"]), min_size=1), st.integers(1, 300))
def test_texts_fit(parts, length):
    text = "x " + " ".join(parts)
    assert len(words(stretch(text, length, words))) == length
    for keep_end in (False, True):
        short = shorten(text, length, words, keep_end)
        assert len(words(short)) <= length
        assert short in text


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="per cents"):
        needle(Mock(), depths=(101,)).load()
    with pytest.raises(ConfigError, match=r"2000.*context is 1024"):
        needle(Mock(), context=1024).load()
    with pytest.raises(DataError, match=r"no \.txt file"):
        needle(Mock(), data=tmp_path).load()
    (tmp_path / "a.txt").write_text("Some text. " * 50)
    task = needle(Mock(), data=tmp_path, lengths=(20,))
    with pytest.raises(ConfigError, match="the question alone"):
        task.prompt(task.load()[0])
