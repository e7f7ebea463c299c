"""Tool use: three numbers from ReAct answers."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from eval_mocks import Mock
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.eval.data import DataError
from nybble.eval.runner import RunFolder, run_task, score_rows
from nybble.eval.task import Settings
from nybble.eval.tasks.tools import Call, ToolUse, parse_call, rouge_l

RIGHT = 'Thought: look it up.\nAction: search\nAction Input: {"b": 1, "a": "x y"}'


def test_calls_are_parsed_leniently():
    assert parse_call(RIGHT) == Call("search", '{"a": "x y", "b": 1}')
    assert parse_call(RIGHT + "\nObservation: made up\nAction: other").action == "search"
    assert parse_call("Action: s\nAction Input: {a: 'x',}").arguments == '{"a": "x"}'
    assert parse_call("Action: s\nAction Input: none") == Call("s", "")
    assert parse_call("Final Answer: 5") == Call("", "")


TOKENS = st.lists(st.sampled_from("abc"), max_size=7)


@settings(max_examples=60)
@given(TOKENS, TOKENS)
def test_rouge_against_all_subsequences(left, right):
    def subsequences(tokens):
        return {c for n in range(len(tokens) + 1) for c in combinations(tokens, n)}

    common = max(len(c) for c in subsequences(left) & subsequences(right))
    expected = 2 * common / (len(left) + len(right)) if common else 0.0
    assert rouge_l(left, right) == pytest.approx(expected)


@pytest.fixture
def folder(tmp_path):
    positive = [{"prompt": f"Question {i}", "response": RIGHT} for i in range(2)]
    negative = [{"prompt": f"Chat {i}", "response": "Final Answer: hi"} for i in range(4)]
    for name, rows in (("positive", positive), ("negative", negative)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"react_{name}.jsonl").write_text(lines)
    return tmp_path


def test_the_three_numbers(folder, tmp_path):
    replies = {
        "Question 0": RIGHT.replace("search", "Search"),
        "Question 1": "Action: search",  # not at a line's start: no call
        "Chat 0": "Thought: why not\nAction: search\nAction Input: {}",
    }
    task = ToolUse("tools", Settings(data=folder))
    answerer = Mock(lambda text: replies.get(text, "Final Answer: hello"))
    summary = run_task(task, answerer, RunFolder(tmp_path / "run", {}))
    assert summary.score == 50
    assert summary.parts == {
        "Tool selection": 50,
        "Tool input (ROUGE-L)": 50,
        "False positives": 25,
    }


def test_only_modern_stops_before_the_observation(folder):
    for protocol, stop in (("card", ()), ("modern", ("\nObservation:",))):
        task = ToolUse("tools", Settings(data=folder, protocol=protocol))
        assert task.prompt(task.load()[0]).stop == stop


def test_foreign_rows():
    row = {"query": "?", "gt": RIGHT, "prediction": RIGHT}
    summary, _ = score_rows(ToolUse("tools", Settings()), [row])
    assert summary.parts == {"Tool selection": 100, "Tool input (ROUGE-L)": 100}


def test_the_data_is_not_published():
    with pytest.raises(DataError, match=r"not published.*--data DIR.*react_positive"):
        ToolUse("tools", Settings()).load()
