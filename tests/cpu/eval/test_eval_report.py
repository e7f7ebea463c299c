"""Reports: tables beside the card's, pictures, one page that needs nothing else."""

from __future__ import annotations

import math
import re
import struct
from html.parser import HTMLParser

import pytest
from eval_mocks import Mock, searcher

from nybble.errors import ConfigError
from nybble.eval import card, plots
from nybble.eval.report import load_run, make_sections, markdown, write
from nybble.eval.runner import RunFolder, run_task
from nybble.eval.statistics import wilson
from nybble.eval.task import Settings, Summary
from nybble.eval.tasks.needle import Needle

ABOUT = {"model": "demo", "weights": "Int4", "protocol": "card", "shots": 0}


def size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


@pytest.fixture
def run(tmp_path):
    """A run of every benchmark of the card, the needle really run."""
    folder = RunFolder(tmp_path / "demo-run", ABOUT)
    for index, name in enumerate(["ceval", "mmlu", "humaneval", "gsm8k", *card.LEVAL_COLUMNS]):
        right = 10 + index
        parts = {"a | part": 50.0} if name == "mmlu" else {}
        folder.summarise(name, Summary(float(right), 100, wilson(right, 100), parts))
    settings = Settings(lengths=(200, 400), depths=(0, 50, 100), tokens=Mock().tokens)
    run_task(Needle("needle", settings), Mock(searcher), folder)
    return tmp_path / "demo-run"


class Page(HTMLParser):
    """Tags are closed in order; what the page would fetch is kept."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data.strip())


def test_files_of_a_report(run, tmp_path):
    paths = write([load_run(run)], tmp_path / "report")
    names = sorted(path.name for path in paths)
    assert names == ["needle-demo-run.png", "radar.png", "report.html", "report.md"]
    text = (tmp_path / "report" / "report.md").read_text()
    for picture in ("needle-demo-run.png", "radar.png"):
        assert f"]({picture})" in text
        assert min(size((tmp_path / "report" / picture).read_bytes())) > 300


def test_the_page_needs_nothing_else(run, tmp_path):
    write([load_run(run)], tmp_path)
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == []
    assert len(page.fetched) == 2
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)
    assert "Qwen-72B-Chat" in page.cells


def test_tables_have_the_cards_rows_and_the_measured_ones(run):
    text = markdown(list(make_sections([load_run(run)])))
    for line in (
        "| LLaMA2-70B-Chat |  | 44.3 |  |",
        "| Yi-34B-Chat | 5-shot | 78.5 |  |",
        "| Qwen-72B-Chat | 0-shot | 76.4 |  |",
        "| Qwen-72B-Chat Int4 | 73.4 | 80.1 | 75.3 | 61.6 |",
        "| ChatGPT-3.5-16k | 60.73 | 63.51 | 84.00 | 61.38 | 78.43 | 12.22 | 64.84 |",
        "| demo (Int4, card, 0-shot) | 0-shot | **10.0** | 5.5 to 17.4, n = 100 |",
        "| demo (Int4, card, 0-shot) | gsm8k | **13.0** | 7.8 to 21.0 | 100 | 75.3 |",
        "| a \\| part | 50.0 |",
    ):
        assert line in text
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        assert row.count("|") >= 3


def test_a_small_run_makes_a_small_report(tmp_path):
    folder = RunFolder(tmp_path / "run", ABOUT | {"shots": 8, "weights": ""})
    folder.summarise("gsm8k", Summary(50.0, 2, wilson(1, 2)))
    titles = [section.title for section in make_sections([load_run(tmp_path / "run")])]
    assert titles == ["What was measured", "GSM8K, accuracy", "What quantisation costs"]


def test_two_runs_stand_side_by_side(run, tmp_path):
    folder = RunFolder(tmp_path / "other", ABOUT | {"weights": "16-bit"})
    folder.summarise("mmlu", Summary(20.0, 5, wilson(1, 5)))
    text = markdown(list(make_sections([load_run(run), load_run(tmp_path / "other")])))
    assert "demo (16-bit, card, 0-shot) | **20.0**" not in text.split("## What quantisation")[0]
    assert "| demo (16-bit, card, 0-shot) | **20.0** (" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name, score in (("first", 10.0), ("second", 20.0)):
        folder = RunFolder(tmp_path / name, ABOUT)
        folder.summarise("mmlu", Summary(score, 5, wilson(1, 5)))
    text = markdown(list(make_sections([load_run(tmp_path / n) for n in ("first", "second")])))
    assert "| demo (Int4, card, 0-shot, first) | mmlu | **10.0** |" in text
    assert "| demo (Int4, card, 0-shot, second) | mmlu | **20.0** |" in text


def test_runs_of_one_folder_name_are_told_apart_too(tmp_path):
    folders = []
    for place, answer in (("a", searcher), ("b", lambda _: "no idea")):
        folders.append(tmp_path / place / "run")
        folder = RunFolder(folders[-1], ABOUT)
        settings = Settings(lengths=(200,), depths=(50,), tokens=Mock().tokens)
        run_task(Needle("needle", settings), Mock(answer), folder)
        for task in card.LEVAL_COLUMNS:
            folder.summarise(task, Summary(len(folders) * 10.0, 5, wilson(1, 5)))
    paths = write([load_run(path) for path in folders], tmp_path / "report")
    pictures = {path.name: path.read_bytes() for path in paths if path.name.startswith("needle")}
    assert sorted(pictures) == ["needle-run-2.png", "needle-run.png"]
    assert len(set(pictures.values())) == 2
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| demo (Int4, card, 0-shot, run) | **10.0** |" in text
    assert "| demo (Int4, card, 0-shot, run-2) | **20.0** |" in text


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"base": True}, "demo (Int4, card, base, 0-shot)"),
        ({"split": "test", "temperature": 0.0}, "demo (Int4, card, 0-shot, test)"),
        ({"temperature": 0.8}, "demo (Int4, card, 0-shot, temperature 0.8)"),
    ],
)
def test_a_name_says_how_the_run_was_made(tmp_path, about, name):
    RunFolder(tmp_path, ABOUT | about).summarise("mmlu", Summary(1.0, 1, wilson(0, 1)))
    assert load_run(tmp_path).name == name


def test_lengths_in_words_are_called_words(tmp_path):
    settings = Settings(lengths=(200,), depths=(50,))
    summary = run_task(Needle("needle", settings), Mock(searcher), RunFolder(tmp_path, ABOUT))
    assert list(summary.parts) == ["200 words"]


def test_names_in_any_letters_are_drawn_without_a_warning(recwarn):
    plots.radar(["a", "b", "c"], {"通义千问": [1, 50, None], "none": [None] * 3}, 1)
    assert not recwarn.list


def test_not_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.json cannot be read.*folder of a run"):
        load_run(tmp_path)
    RunFolder(tmp_path, {"model": "m"}).summarise("mmlu", Summary(1.0, 1, wilson(0, 1)))
    with pytest.raises(ConfigError, match="has no protocol, shots, weights"):
        load_run(tmp_path)


def test_the_cards_figures():
    assert card.figure("mmlu", 0, "Int4") == 73.4
    assert card.figure("mmlu", 0, "16-bit") == 74.4
    assert card.figure("mmlu", 0, "") == 74.3
    assert card.figure("mmlu", 5, "Int4") == 75.0
    assert card.figure("leval-codeU", 0, "Int4") == 6.66
    assert card.figure("needle", 0, "Int4") is None
    for model, average in (("ChatGPT-3.5-16k", 60.73), ("Qwen-72B-Chat", 62.30)):
        values = card.LEVAL[model]
        assert sum(values) / len(values) == pytest.approx(average, abs=0.006)


def test_pictures_of_any_size():
    assert size(plots.radar(["a", "b", "c"], {"m": [1, 50, None], "n": [1, 2, 3]}, 1))
    cells = {(1000 * i, j): (i + j) % 2 for i in range(1, 9) for j in range(0, 101, 10)}
    wide, high = size(plots.needle_map("title", cells, "tokens"))
    assert wide > high
    assert size(plots.needle_map("one cell", {(100, 50): math.nan}, "words"))
