"""Runs beside the card's figures: tables and pictures as Markdown, and one HTML page."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from nybble.errors import ConfigError
from nybble.eval import card, plots
from nybble.eval.runner import read_json, read_rows
from nybble.eval.tasks import needle

_SPOKES = {**card.QUANTIZATION_COLUMNS, "ceval": "C-Eval", "leval": "L-Eval"}
_RADAR_MODELS = ("Qwen-72B-Chat", "ChatGPT3.5", "ChatGPT4", "LLaMA2-70B-Chat")
_NOTE = (
    "Intervals are 95 %: Wilson's for shares of right answers, a bootstrap where many scores are "
    "averaged over subjects or lie between right and wrong. The card's figures have none, and one "
    "HumanEval problem is 0.6 points."
)


@dataclass(frozen=True)
class Run:
    """A run's folder as the report needs it. results: task -> its summary.

    label: the folder's name, for files. suffix: the same, where the name alone is ambiguous.
    """

    folder: Path
    about: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]
    label: str = ""
    suffix: str = ""

    @property
    def name(self) -> str:
        about = self.about
        temperature = about.get("temperature")
        details = [
            about["weights"],
            about["protocol"],
            "base" if about.get("base") else "",
            f"{self.shots}-shot",
            about.get("split"),
            f"temperature {temperature:g}" if temperature else "",
            self.suffix,
        ]
        return f"{about['model']} ({', '.join(str(d) for d in details if d)})"

    @property
    def shots(self) -> int:
        return int(self.about["shots"])

    def score(self, task: str) -> float | None:
        return self.results[task]["score"] if task in self.results else None


@dataclass(frozen=True)
class Section:
    """A table, a picture, or both. Cells that begin with ** are the measured ones."""

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""
    picture: tuple[str, bytes] | None = field(default=None, repr=False)


def load_run(folder: Path) -> Run:
    about, results = read_json(folder / "run.json"), read_json(folder / "results.json")
    missing = [key for key in ("model", "protocol", "shots", "weights") if key not in about]
    if missing:
        raise ConfigError(f"{folder}/run.json has no {', '.join(missing)}: run it again.")
    return Run(folder, about, results)


def write(runs: Sequence[Run], out: Path) -> list[Path]:
    """report.md, report.html and the PNGs that report.md shows; returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    sections = list(make_sections(runs))
    files = {"report.md": markdown(sections).encode(), "report.html": html(sections).encode()}
    files |= dict(section.picture for section in sections if section.picture)
    for name, content in files.items():
        (out / name).write_bytes(content)
    return [out / name for name in files]


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Every run with a label of its own; runs of one name have it in their names besides."""
    count = Counter(run.name for run in runs)
    labels: list[str] = []
    for run in runs:
        label = name = _file_name(run.folder.resolve().name)
        number = 1
        while label in labels:
            label, number = f"{name}-{number + 1}", number + 1
        labels.append(label)
    return [
        replace(run, label=label, suffix=label if count[run.name] > 1 else "")
        for run, label in zip(runs, labels, strict=True)
    ]


def make_sections(runs: Sequence[Run]) -> Iterator[Section]:
    runs = distinct(runs)
    yield _overview(runs)
    spokes = [task for task in _SPOKES if any(_spoke(run, task) is not None for run in runs)]
    if len(spokes) >= 3:
        yield Section("At a glance", picture=("radar.png", _radar(runs, spokes)))
    for table in card.TABLES:
        if any(table.task in run.results for run in runs):
            yield _card_table(table, runs)
    if any(task in run.results for run in runs for task in card.QUANTIZATION_COLUMNS):
        yield _quantization(runs)
    if any(task in run.results for run in runs for task in card.LEVAL_COLUMNS):
        yield _leval(runs)
    for run in runs:
        yield from _of_one(run)


# -- sections ------------------------------------------------------------------------------------


def _overview(runs: Sequence[Run]) -> Section:
    rows = [
        [
            run.name,
            task,
            bold(result["score"]),
            interval(result),
            str(result["n"]),
            beside(run, task),
        ]
        for run in runs
        for task, result in run.results.items()
    ]
    head = ("Run", "Benchmark", "Score", "95 % interval", "n", "Card, Qwen-72B-Chat")
    return Section("What was measured", head, rows, _NOTE)


def _card_table(table: card.Table, runs: Sequence[Run]) -> Section:
    rows = [[model, shots, f"{value:.1f}", ""] for (model, shots), value in table.rows.items()]
    rows += [
        [
            run.name,
            f"{run.shots}-shot",
            bold(result["score"]),
            f"{interval(result)}, n = {result['n']}",
        ]
        for run in runs
        if (result := run.results.get(table.task))
    ]
    return Section(table.title, ("Model", "Shots", "Score", "95 % interval"), rows)


def _quantization(runs: Sequence[Run]) -> Section:
    columns = card.QUANTIZATION_COLUMNS
    rows = [
        [f"Qwen-72B-Chat {weights}", *(f"{value:.1f}" for value in values)]
        for weights, values in card.QUANTIZATION.items()
    ]
    rows += [
        [run.name, *_cells(run, columns)]
        for run in runs
        if any(task in run.results for task in columns)
    ]
    return Section("What quantisation costs", ("Weights", *columns.values()), rows)


def _leval(runs: Sequence[Run]) -> Section:
    columns = card.LEVAL_COLUMNS
    rows = [
        [model, f"{sum(values) / len(values):.2f}", *(f"{value:.2f}" for value in values)]
        for model, values in card.LEVAL.items()
    ]
    for run in runs:
        if any(task in run.results for task in columns):
            average = _spoke(run, "leval")
            rows.append([run.name, "" if average is None else bold(average), *_cells(run, columns)])
    return Section("L-Eval, closed-ended tasks", ("Model", "Average", *columns.values()), rows)


def _cells(run: Run, columns: Mapping[str, str]) -> list[str]:
    """The run's scores with their intervals, "" where it has none."""
    return [
        f"{bold(found['score'])} ({interval(found)})" if (found := run.results.get(task)) else ""
        for task in columns
    ]


def _of_one(run: Run) -> Iterator[Section]:
    """What only this run has: its needle map, and the parts of its scores."""
    if "needle" in run.results:
        rows = read_rows(run.folder / "needle.jsonl")
        cells = {(int(row.subject), int(row.fields["depth"])): row.score for row in rows}
        picture = plots.needle_map(run.name, cells, needle.unit(rows))
        file = f"needle-{run.label}.png"
        yield Section(f"Needle in a haystack, {run.name}", picture=(file, picture))
    for task, result in run.results.items():
        if parts := result.get("parts"):
            lines = [[name, f"{value:.1f}"] for name, value in parts.items()]
            yield Section(f"{task} in parts, {run.name}", ("Part", "Score"), lines)


def _radar(runs: Sequence[Run], spokes: Sequence[str]) -> bytes:
    lines = {run.name: [_spoke(run, task) for task in spokes] for run in runs}
    for model in _RADAR_MODELS:
        lines[f"{model} (card)"] = [_card_spoke(model, task) for task in spokes]
    return plots.radar([_SPOKES[task] for task in spokes], lines, measured=len(runs))


def _spoke(run: Run, task: str) -> float | None:
    """A run's score; of L-Eval the mean, once all six parts are there."""
    if task != "leval":
        return run.score(task)
    scores = [run.score(part) for part in card.LEVAL_COLUMNS]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def _card_spoke(model: str, task: str) -> float | None:
    if task == "leval":
        values = card.LEVAL.get("ChatGPT-3.5-16k" if model == "ChatGPT3.5" else model)
        return sum(values) / len(values) if values else None
    rows = next(table.rows for table in card.TABLES if table.task == task)
    return rows.get((model, "0-shot"), rows.get((model, "")))


# -- text ----------------------------------------------------------------------------------------


def bold(score: float) -> str:
    return f"**{score:.1f}**"


def interval(result: Mapping[str, Any]) -> str:
    found = result["interval"]
    return f"{found['low']:.1f} to {found['high']:.1f}"


def beside(run: Run, task: str) -> str:
    value = card.figure(task, run.shots, str(run.about["weights"]))
    return "" if value is None else f"{value:g}"


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)


def markdown(sections: Sequence[Section]) -> str:
    parts = ["# Evaluation\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        if section.picture:
            parts.append(f"![{section.title}]({section.picture[0]})\n")
        if section.head:
            table = [section.head, ["---"] * len(section.head), *section.rows]
            parts.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in table) + "\n")
        if section.note:
            parts.append(f"{section.note}\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h2 { margin-top: 2.5rem; font-size: 1.2rem }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
tr.measured { background: #f3effb }
img { max-width: 100% }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } th, td { border-color: #444 }
  tr.measured { background: #2c2440 } }
"""


def html(sections: Sequence[Section]) -> str:
    """One page with its pictures inside: it needs no other file and no network."""
    body = "\n".join(_html_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Evaluation</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>Evaluation</h1>\n{body}\n</body></html>\n"
    )


def _html_section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.picture:
        data = base64.b64encode(section.picture[1]).decode()
        parts.append(f'<img alt="{escape(section.title)}" src="data:image/png;base64,{data}">')
    if section.head:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in section.head)
        rows = "\n".join(map(_html_row, section.rows))
        parts.append(f"<div><table><tr>{head}</tr>\n{rows}</table></div>")
    if section.note:
        parts.append(f"<p>{escape(section.note)}</p>")
    return "\n".join(parts)


def _html_row(row: Sequence[str]) -> str:
    measured = ' class="measured"' if any(cell.startswith("**") for cell in row) else ""
    cells = "".join(f"<td>{_html_cell(cell)}</td>" for cell in row)
    return f"<tr{measured}>{cells}</tr>"


def _html_cell(text: str) -> str:
    if not text.startswith("**"):
        return escape(text)
    score, _, rest = text[2:].partition("**")
    return f"<b>{escape(score)}</b>{escape(rest)}"
