"""The benchmarks on a real model, a few rows of each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nybble import LLM
from nybble.eval.answerers import Decoding, LocalModel
from nybble.eval.report import load_run, write
from nybble.eval.runner import RunFolder, read_rows, run_task
from nybble.eval.task import Settings
from nybble.eval.tasks import make_task

DATA = Path(__file__).parents[1] / "data" / "eval"
ABOUT = {"model": "demo", "weights": "Int4", "protocol": "card", "shots": 0}


@pytest.fixture(scope="module")
def llm():
    return LLM("demo")


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run", ABOUT)


def run(name, llm, folder, limit, max_tokens, **settings):
    answerer = LocalModel(llm, Decoding(max_tokens=max_tokens))
    found = Settings(tokens=answerer.tokens, context=answerer.context, **settings)
    return run_task(make_task(name, found), answerer, folder, limit=limit)


def test_a_run_to_its_report(llm, folder, tmp_path):
    shutil.copy(DATA / "gsm8k-test.jsonl", tmp_path / "test.jsonl")
    run("gsm8k", llm, folder, 2, 24, data=tmp_path)
    summary = run("needle", llm, folder, None, 40, lengths=(200,), depths=(0, 100))
    assert summary.score > 50
    rows = read_rows(folder.path / "gsm8k.jsonl")
    assert len(rows) == 2
    assert all(row.prediction for row in rows)
    names = {path.name for path in write([load_run(folder.path)], tmp_path / "report")}
    assert names == {"report.md", "report.html", "needle-run.png"}


def test_options_by_likelihood_as_by_logits(llm):
    answerer = LocalModel(llm)
    prompt = "Question: What is the capital of France?\nA. Rome\nB. Paris\nAnswer:"
    options = (" A", " B", " C", " D")
    logprobs = llm.logits(llm.encode(prompt))[-1].log_softmax(-1)
    expected = [float(logprobs[llm.tokenizer.encode(option)[0]]) for option in options]
    assert answerer.option_logprobs(prompt, options) == pytest.approx(expected, abs=0.02)
