"""`nybble eval` from its arguments to files, output and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from eval_mocks import Mock, searcher
from safetensors.torch import save_file
from typer.testing import CliRunner

from nybble.cli.app import app

DATA = Path(__file__).parents[2] / "data" / "eval"


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def gsm8k(tmp_path):
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    shutil.copy(DATA / "gsm8k-test.jsonl", tmp_path / "data" / "gsm8k" / "test.jsonl")
    return tmp_path / "data"


@pytest.fixture
def model(monkeypatch, tmp_path):
    """Stands in for a loaded model; answers 18, which is right once."""
    monkeypatch.chdir(tmp_path)
    quant, folder = SimpleNamespace(bits=4), tmp_path / "model"
    folder.mkdir()
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    llm = SimpleNamespace(config=SimpleNamespace(quant=quant), folder=folder)
    monkeypatch.setattr("nybble.cli.loading.load", lambda *_, **__: llm)
    mock = Mock(lambda text: searcher(text) if "San Francisco" in text else "The answer is $18.")
    monkeypatch.setattr("nybble.eval.answerers.LocalModel", lambda *_: mock)
    return mock


def test_score_prints_json(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [
        {"query": "?", "gt": "C", "prediction": "C"},
        {"query": "?", "gt": "BD", "prediction": "B"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("score", "leval-coursera", "--predictions", file, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["score"] == 62.5
    assert json.loads(result.stdout)["n"] == 2
    assert run("score", "leval-coursera", "--predictions", file).stdout.startswith(
        "leval-coursera: 62.50 (95 % "
    )


def test_a_run_and_its_report(model, gsm8k, tmp_path):
    result = run("gsm8k", "demo", "--data", gsm8k, "--limit", 4, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["gsm8k"]["score"] == 25
    folder = tmp_path / "eval-runs" / "demo-card-0shot"
    assert json.loads((folder / "run.json").read_text())["weights"] == "Int4"
    assert len((folder / "gsm8k.jsonl").read_text().splitlines()) == 4
    assert run("gsm8k", "demo", "--data", gsm8k).stdout.startswith("gsm8k: 16.67")
    assert len(model.prompts) == 6
    result = run("report", folder, "--out", tmp_path / "report")
    assert result.exit_code == 0
    assert "| 75.3 |" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("option", "value"), [("--kv-dtype", "int4"), ("--dtype", "float32"), ("--max-context", "99")]
)
def test_a_run_is_continued_with_the_same_model_only(model, gsm8k, option, value):
    arguments = ("gsm8k", "demo", "--data", gsm8k, "--out", "r")
    assert run(*arguments, "--threads", 1).exit_code == 0
    result = run(*arguments, option, value)
    assert result.exit_code == 1
    assert f"another run ({option[2:].replace('-', '_')} differ)" in result.stderr
    assert run(*arguments, "--threads", 2).exit_code == 0


def test_a_run_is_not_continued_with_other_weights_of_the_same_name(model, gsm8k, tmp_path):
    arguments = ("gsm8k", "demo", "--data", gsm8k, "--out", "r")
    assert run(*arguments, "--limit", 2).exit_code == 0
    save_file({"weight": torch.ones(3)}, tmp_path / "model" / "model.safetensors")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "another run (checkpoint differ)" in result.stderr


@pytest.fixture
def no_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("nybble.cli.loading.load", load)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gsm8k", "--shots", 3), "0 or 4 or 8 shots"),
        (("gsm8k", "--split", "val"), "no split"),
        (("mmlu", "--subjects", "poems"), "no subject 'poems'"),
        (("needle", "--depths", 101), "--depths has 101"),
        (("needle", "--lengths", "4000,20"), "--lengths has 20"),
        (("gsm8k", "--max-tokens", 0), "max_tokens"),
        (("gsm8k", "--temperature", -1), "temperature"),
        (("gsm8k", "--data", "nowhere"), "is no folder"),
        (("gsm8k", "--data", "~nosuchuser"), "no such user"),
        (("all", "--data", "nowhere", "--shots", 5), "No benchmark is left"),
        (("gsm8k", "--out", "gsm8k/file"), "cannot be made"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(no_model, gsm8k, arguments, message):
    (gsm8k / "file").touch()
    name, *rest = arguments
    rest = [gsm8k / "file" / "x" if word == "gsm8k/file" else word for word in rest]
    result = run(name, "demo", *(() if "--data" in rest else ("--data", gsm8k)), *rest)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_all_leaves_out_what_an_option_does_not_go_with(model, gsm8k):
    shutil.copy(DATA / "gsm8k-test.jsonl", gsm8k / "gsm8k" / "train.jsonl")
    result = run("all", "demo", "--data", gsm8k, "--shots", 4, "--out", "r")
    assert result.stdout.startswith("gsm8k: 16.67")
    assert "needle is left out. needle is defined with 0 shots" in result.stderr


def test_all_brings_its_own_needle(model, gsm8k, monkeypatch):
    monkeypatch.setattr("nybble.eval.task.Settings.lengths", (200,))
    monkeypatch.setattr("nybble.eval.task.Settings.depths", (50,))
    (gsm8k / "README.txt").write_text("No prose.")
    assert "needle: 100.00" in run("all", "demo", "--data", gsm8k, "--out", "r").stdout
    assert all("No prose." not in prompt.text for prompt in model.prompts)


def test_a_missing_file_of_leval_leaves_the_others(model, tmp_path):
    row = {"input": "text", "instructions": ["Q"], "outputs": ["18"]}
    (tmp_path / "gsm100.jsonl").write_text(json.dumps(row))
    result = run("leval", "demo", "--data", tmp_path, "--out", "r")
    assert result.exit_code == 0
    assert result.stdout.startswith("leval-gsm100: 100.00")
    assert "leval-tpo is left out." in result.stderr


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("leval", {}, "leval is several benchmarks, score takes one: leval-coursera"),
        ("all", {}, "all is several benchmarks"),
        ("needle", {}, "must have its length as `subject`"),
        ("gsm8k", {"sample": "x"}, "line 1: 'sample' cannot be 'x'"),
        ("gsm8k", {"fields": [1]}, "line 1: 'fields' cannot be [1]"),
        ("gsm8k", {"subject": 3}, "line 1: 'subject' cannot be 3"),
    ],
)
def test_rows_that_cannot_be_scored(tmp_path, task, row, message):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"query": "?", "gt": "1", "prediction": "1"} | row))
    result = run("score", task, "--predictions", file)
    assert result.exit_code == 1
    assert message in result.stderr


def test_all_leaves_out_what_has_no_data(model, gsm8k, monkeypatch):
    monkeypatch.setattr("nybble.eval.task.Settings.lengths", (200,))
    monkeypatch.setattr("nybble.eval.task.Settings.depths", (50,))
    result = run("all", "demo", "--data", gsm8k, "--out", "r")
    assert result.exit_code == 0, result.stderr
    assert "gsm8k: 16.67" in result.stdout
    for name in ("ceval", "mmlu", "humaneval", "leval-coursera", "tools"):
        assert f"{name} is left out" in result.stderr


def test_the_needle_without_data(model):
    result = run("needle", "demo", "--lengths", "200,300", "--depths", "0,100", "--out", "r")
    assert result.stdout.startswith("needle: 100.00")
    assert "  300 tokens: 100.00\n" in result.stdout
    assert len(model.prompts) == 4


def test_ctrl_c_says_that_the_rows_are_kept(model, gsm8k, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "answer", interrupt)
    result = run("gsm8k", "demo", "--data", gsm8k, "--out", "r")
    assert result.exit_code == 130
    assert "What is finished is kept in r: run it again" in result.stderr


def test_a_log_gets_a_line_now_and_then(model, gsm8k, monkeypatch):
    monkeypatch.setattr("nybble.cli.benchmarks._Shown._EVERY", 0.0)
    result = run("gsm8k", "demo", "--data", gsm8k, "--batch", 2, "--out", "r")
    assert "gsm8k: 2 of 6\n" in result.stderr


@pytest.mark.parametrize("subjects", ["gsm100", " gsm100 ,"])
def test_part_of_leval(model, tmp_path, subjects):
    row = {"input": "text", "instructions": ["Q"], "outputs": ["18"]}
    (tmp_path / "gsm100.jsonl").write_text(json.dumps(row))
    result = run("leval", "demo", "--data", tmp_path, "--subjects", subjects, "--out", "r")
    assert result.stdout.startswith("leval-gsm100: 100.00")


def test_an_endpoint_needs_no_model(monkeypatch, gsm8k, tmp_path):
    monkeypatch.chdir(tmp_path)
    mock = Mock(lambda _: "18")
    monkeypatch.setattr("nybble.eval.answerers.Endpoint", lambda *_, **__: mock)
    result = run("gsm8k", "m", "--endpoint", "http://x/v1", "--data", gsm8k, "--out", "r")
    assert result.stdout.startswith("gsm8k: 16.67")
    assert json.loads((tmp_path / "r" / "run.json").read_text())["weights"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gsm8k", "demo", "--protocol", "old"), "use card or modern"),
        (("gsm8k", "demo", "--limit", "0"), "at least 1"),
        (("gsm8k", "demo", "--samples", "3"), "--temperature"),
        (("gsm8k", "demo", "--batch", "0"), "--batch"),
        (("gsm8k", "demo", "--shots", "3"), "--shots"),
        (("needle", "demo", "--lengths", "1k"), "whole numbers"),
        (("gsm8k", "demo", "--subjects", "law"), "no subjects"),
        (("gsm8k", "demo", "--split", "val"), "no --split"),
        (("gsm8k", "demo", "--depths", "0"), "needle only"),
        (("gsm8k", "m", "--endpoint", "http://x/v1", "--device", "cpu"), "--device"),
        (("leval", "demo", "--subjects", "poems"), "no benchmark 'leval-poems'"),
        (("score", "gsm9k", "--predictions", "p.jsonl"), "cannot be read"),
        (("report", "nowhere"), "folder of a run"),
    ],
)
def test_refusals_are_one_line(model, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
