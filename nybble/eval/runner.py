"""Runs benchmarks against a model; what is finished is on disk and is not run again.

A run is a folder: run.json (what was run), TASK.jsonl (a row for each answer), results.json
(a summary for each task), ceval-submission.json where the test set was run.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nybble.errors import ConfigError
from nybble.eval.answerers import Answerer
from nybble.eval.task import Item, Prompt, Row, Summary, Task

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

Key = tuple[str, int]
"""An item's id and the number of its sample."""


class RunFolder:
    """A run on disk. `about` says what it is; a folder that holds another run is refused.

    Nothing is written before the first row: what could not begin is no run.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self._about = path, about
        if (file := path / "run.json").exists():
            self._check_same(read_json(file), about)

    def _begin(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self._about, ensure_ascii=False, indent=1) + "\n"
        _write_whole(self.path / "run.json", content)

    def _check_same(self, before: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        differ = [key for key in about if key in before and before[key] != about[key]]
        if differ := [key for key in differ if key != "version"]:
            raise ConfigError(
                f"{self.path} holds another run ({', '.join(differ)} differ): "
                "give --out another folder, or remove this one."
            )

    def rows(self, task: str) -> dict[Key, Row]:
        """The finished rows. A last line that a kill cut short is removed from the file."""
        file = self.path / f"{task}.jsonl"
        if not file.exists():
            return {}
        whole, _, torn = file.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(file, len(whole) + 1 if whole else 0)
        return {(row.id, row.sample): row for row in read_rows(file)}

    def append(self, task: str, rows: Sequence[Row]) -> None:
        self._begin()
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows]
        with (self.path / f"{task}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def summarise(self, task: str, summary: Summary) -> None:
        self._begin()
        file = self.path / "results.json"
        results = read_json(file) if file.exists() else {}
        results[task] = asdict(summary)
        _write_whole(file, json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def run_task(
    task: Task,
    answerer: Answerer,
    folder: RunFolder,
    *,
    limit: int | None = None,
    batch: int = 8,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Summary:
    """Answer what is not answered yet, a batch at a time, and sum up all rows that were wanted.

    limit: so many items, evenly from the subjects. seed: of the samples; it counts only where
    the temperature is not 0.
    """
    items = evenly(task.load(), limit)
    wanted = [(item, sample) for item in items for sample in range(task.settings.samples)]
    done = folder.rows(task.name)
    _check_same_questions(wanted, done, folder.path)
    missing = [(index, job) for index, job in enumerate(wanted) if _key(job) not in done]
    for begin in range(0, len(missing), batch):
        progress(task.name, len(wanted) - len(missing) + begin, len(wanted))
        part = missing[begin : begin + batch]
        jobs = [job for _, job in part]
        rows = _answered(task, answerer, jobs, [seed + index for index, _ in part])
        folder.append(task.name, rows)
        done |= {(row.id, row.sample): row for row in rows}
    progress(task.name, len(wanted), len(wanted))
    return _finish(task, folder, [done[_key(job)] for job in wanted])


def _key(job: tuple[Item, int]) -> Key:
    return job[0].id, job[1]


def _check_same_questions(
    wanted: Sequence[tuple[Item, int]], done: Mapping[Key, Row], folder: Path
) -> None:
    """ConfigError where a finished row answers another question than the data now has."""
    for item, sample in wanted:
        row = done.get((item.id, sample))
        if row and (row.query, row.gt, row.fields) != (item.query, item.reference, item.fields):
            raise ConfigError(
                f"{folder} holds answers to other questions than the data now has ({item.id}, for "
                "one): give --out another folder, or remove this one."
            )


def _finish(task: Task, folder: RunFolder, rows: Sequence[Row]) -> Summary:
    for name, content in task.files(rows).items():
        _write_whole(folder.path / name, content)
    summary = task.aggregate(rows)
    folder.summarise(task.name, summary)
    return summary


def _answered(
    task: Task, answerer: Answerer, jobs: Sequence[tuple[Item, int]], seeds: Sequence[int]
) -> list[Row]:
    prompts = [task.prompt(item) for item, _ in jobs]
    if any(prompt.options for prompt in prompts):
        texts = [_likeliest(answerer, prompt) for prompt in prompts]
    else:
        texts = answerer.answer(prompts, seeds)
    return [
        task.judge(item, text, prompt.text, sample)
        for (item, sample), prompt, text in zip(jobs, prompts, texts, strict=True)
    ]


def _likeliest(answerer: Answerer, prompt: Prompt) -> str:
    logprobs = answerer.option_logprobs(prompt.text, prompt.options)
    return max(zip(logprobs, prompt.options, strict=True), key=lambda pair: pair[0])[1]


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, the first of each subject, then the second, and so on."""
    if limit is None or limit >= len(items):
        return list(items)
    subjects: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        subjects[item.subject].append(item)
    rounds = zip_longest(*subjects.values())
    return [item for turn in rounds for item in turn if item is not None][:limit]


def score_rows(task: Task, rows: Sequence[Mapping[str, Any]]) -> tuple[Summary, list[Row]]:
    """Score what another system (or an earlier run) produced."""
    judged = [
        task.judge(item, output, sample=int(row.get("sample", 0)))
        for index, row in enumerate(rows)
        for item, output in task.items_of(row, index)
    ]
    return task.aggregate(judged), judged


# -- files ---------------------------------------------------------------------------------------


def read_rows(file: Path) -> list[Row]:
    try:
        # Not splitlines: a model's text may hold other line separators than "\n".
        lines = file.read_text(encoding="utf-8").split("\n")
        return [Row(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read as rows of a run ({error}): remove it to run it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """ConfigError where the file is missing or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give the folder of a run.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is no JSON object: give the folder of a run.")
    return value


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
