"""Runs on disk: resumed after a kill, refused when they differ, limited evenly."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from eval_mocks import Mock

from nybble.errors import ConfigError
from nybble.eval.runner import RunFolder, evenly, read_rows, run_task, score_rows
from nybble.eval.task import Item, Prompt, Settings, Task


class Adding(Task):
    """Eight sums in two subjects."""

    shots = (0,)

    def load(self):
        return [Item(f"q{i}", f"{i}+1", str(i + 1), "odd" if i % 2 else "even") for i in range(8)]

    def prompt(self, item):
        return Prompt(item.query)

    def extract(self, item, output):
        return output or None

    def score(self, item, answer):
        return float(answer == item.reference)


def adder(text):
    left, right = text.split("+")
    return str(int(left) + int(right))


class Killed(Mock):
    """Dies with the n-th prompt."""

    def __init__(self, after):
        super().__init__(adder)
        self.after = after

    def answer(self, prompts, seeds):
        if len(self.prompts) + len(prompts) > self.after:
            raise KeyboardInterrupt
        return super().answer(prompts, seeds)


def task(**settings):
    return Adding("adding", Settings(**settings))


def test_a_run_and_what_it_leaves(tmp_path):
    calls = []
    folder = RunFolder(tmp_path, {"model": "m"})
    summary = run_task(
        task(), Mock(adder), folder, batch=3, progress=lambda *args: calls.append(args)
    )
    assert (summary.score, summary.n) == (100, 8)
    assert [done for _, done, _ in calls] == [0, 3, 6, 8]
    rows = read_rows(tmp_path / "adding.jsonl")
    assert (rows[0].query, rows[0].prompt, rows[0].prediction, rows[0].gt) == (
        "0+1",
        "0+1",
        "1",
        "1",
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["adding"]["score"] == 100
    assert results["adding"]["interval"]["method"] == "Wilson"


def test_finished_rows_are_not_run_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_task(task(), Killed(after=5), RunFolder(tmp_path, {}), batch=2)
    again = Mock(adder)
    assert run_task(task(), again, RunFolder(tmp_path, {}), batch=2).score == 100
    assert len(again.prompts) == 4
    third = Mock(adder)
    assert run_task(task(), third, RunFolder(tmp_path, {})).n == 8
    assert third.prompts == []


@pytest.mark.parametrize("torn", ['{"id": "q0", "sam', "{", '{"id": "q7"}'])
def test_a_line_cut_short_by_a_kill_is_run_again(tmp_path, torn):
    run_task(task(), Mock(adder), RunFolder(tmp_path, {}), limit=2)
    with (tmp_path / "adding.jsonl").open("a") as file:
        file.write(torn)
    again = Mock(adder)
    assert run_task(task(), again, RunFolder(tmp_path, {})).score == 100
    assert len(again.prompts) == 6
    assert len(read_rows(tmp_path / "adding.jsonl")) == 8


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "adding.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="remove it"):
        run_task(task(), Mock(adder), RunFolder(tmp_path, {}))


def test_another_runs_folder_is_refused(tmp_path):
    RunFolder(tmp_path, {"model": "m", "shots": 9})  # never began
    RunFolder(tmp_path, {"model": "m", "shots": 0, "version": "1"}).append("adding", [])
    RunFolder(tmp_path, {"model": "m", "shots": 0, "version": "2"})
    with pytest.raises(ConfigError, match=r"another run \(shots differ\).*--out"):
        RunFolder(tmp_path, {"model": "m", "shots": 5, "version": "1"})


@pytest.mark.parametrize("change", [{"query": "9+1"}, {"reference": "7"}, {"fields": {"a": 1}}])
def test_answers_to_other_questions_are_not_taken_over(tmp_path, monkeypatch, change):
    run_task(task(), Mock(adder), RunFolder(tmp_path, {}))
    items = [replace(item, **change) if item.id == "q3" else item for item in task().load()]
    monkeypatch.setattr(Adding, "load", lambda self: items)
    with pytest.raises(ConfigError, match=r"other questions .*\(q3, for one\): give --out"):
        run_task(task(), Mock(adder), RunFolder(tmp_path, {}))


def test_samples_have_seeds_of_their_own(tmp_path):
    answerer = Mock(adder)
    summary = run_task(task(samples=3), answerer, RunFolder(tmp_path, {}), limit=4, seed=100)
    assert summary.n == 12
    assert answerer.seeds == list(range(100, 112))


def test_a_resumed_run_keeps_its_seeds(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_task(task(samples=2), Killed(after=6), RunFolder(tmp_path, {}), batch=4)
    again = Mock(adder)
    run_task(task(samples=2), again, RunFolder(tmp_path, {}), batch=4)
    assert again.seeds == list(range(4, 16))


def test_limits_are_shared_among_subjects():
    items = [Item(str(i), "", "", subject) for i, subject in enumerate("aaaaabbc")]
    assert [item.subject for item in evenly(items, 5)] == ["a", "b", "c", "a", "b"]
    assert evenly(items, None) == items
    assert evenly(items, 99) == items


def test_rows_of_a_run_can_be_scored_again(tmp_path):
    run_task(task(samples=2), Mock(adder), RunFolder(tmp_path, {}))
    lines = (tmp_path / "adding.jsonl").read_text().splitlines()
    summary, rows = score_rows(task(), [json.loads(line) for line in lines])
    assert summary.score == 100
    assert {(row.id, row.sample) for row in rows} == {
        (f"q{i}", s) for i in range(8) for s in (0, 1)
    }
    assert {row.subject for row in rows} == {"odd", "even"}


def test_separators_inside_answers_do_not_break_lines(tmp_path):
    run_task(task(), Mock(lambda _: "a\u2028b\x85c\nd"), RunFolder(tmp_path, {}))
    assert {row.prediction for row in read_rows(tmp_path / "adding.jsonl")} == {"a\u2028b\x85c\nd"}
