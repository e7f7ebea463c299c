"""A file of prompts to a file of answers: the same ones as alone, whatever is cut off between."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from nybble import LLM, ConfigError, SamplingParams
from nybble.batch.answers import Answers
from nybble.batch.rows import read_rows
from nybble.batch.run import Batch
from nybble.cli.app import app

GREEDY = SamplingParams(temperature=0, max_tokens=12)
ABOUT = {"model": "toy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32", max_running=4, threads=1)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(llm, rows, folder, progress=lambda state: None):
    source, target = write(folder / "prompts.jsonl", rows), folder / "answers.jsonl"
    with Answers(target, ABOUT) as answers:
        summary = Batch(llm, answers, GREEDY, progress).run(read_rows(source))
    return summary, read(target)


def test_each_row_gets_the_answer_it_gets_alone(llm, tmp_path):
    chat = [{"role": "user", "content": "hello"}]
    rows = [
        {"prompt": "the quick", "max_tokens": 40},
        {"prompt": [5, 6, 7], "id": 7},
        {"messages": chat, "id": "chat", "temperature": 0.9, "seed": 3},
        {"prompt": "brown fox", "ignore_eos": True, "max_tokens": 3},
    ]
    summary, answers = answer(llm, rows, tmp_path)
    alone = [
        llm.generate("the quick", SamplingParams(temperature=0, max_tokens=40)),
        llm.generate([5, 6, 7], GREEDY),
        llm.chat(chat, sampling_params=SamplingParams(temperature=0.9, seed=3, max_tokens=12)),
        llm.generate("brown fox", SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)),
    ]
    assert [row["text"] for row in answers] == [one.text for one in alone]
    assert [row["finish_reason"] for row in answers] == [one.finish_reason for one in alone]
    assert [row["prompt_tokens"] for row in answers] == [len(one.prompt_token_ids) for one in alone]
    assert [row["new_tokens"] for row in answers] == [len(one.token_ids) for one in alone]
    assert [row["line"] for row in answers] == [1, 2, 3, 4]
    assert [row.get("id") for row in answers] == [None, 7, "chat", None]
    assert (summary.rows, summary.failed) == (4, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_a_stop_string_ends_a_row_and_gives_its_pages_back(llm, tmp_path):
    text = llm.generate("the quick", GREEDY).text
    stop = text[3:6]
    _, (row,) = answer(llm, [{"prompt": "the quick", "stop": stop}], tmp_path)
    assert row["text"] == text[: text.index(stop)]
    assert row["finish_reason"] == "stop"
    llm.engine.step()
    assert llm.engine.idle
    assert llm.engine.load.pages_used == 0


def test_the_order_is_that_of_the_prompts_and_few_are_in_flight(llm, tmp_path):
    rows = [{"prompt": [5 + i], "max_tokens": 1 + 29 * i % 30} for i in range(40)]
    most, done = 0, []

    def watch(state):
        nonlocal most
        most = max(most, len(llm.engine.alive))
        done.append(state.done)
        assert state.total == 40

    _, answers = answer(llm, rows, tmp_path, watch)
    assert [row["line"] for row in answers] == list(range(1, 41))
    assert [row["new_tokens"] for row in answers] == [row["max_tokens"] for row in rows]
    assert 4 < most <= 8
    assert done == sorted(done)
    assert done[-1] == 40


def test_a_row_that_does_not_fit_is_told_so_and_harms_no_other(llm, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": [5] * 300, "id": "long"}, {"prompt": [99999]}]
    summary, answers = answer(llm, rows, tmp_path)
    assert "text" in answers[0]
    assert answers[1]["id"] == "long"
    assert "shorten the prompt" in answers[1]["error"]
    assert "not a token id" in answers[2]["error"]
    assert summary.failed == 2


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"id": 1}', "needs either a prompt or messages"),
        ('{"prompt": "a", "messages": []}', "needs either"),
        ('{"prompt": ""}', "its prompt is empty"),
        ('{"prompt": 5}', "its prompt is empty or no text"),
        ('{"prompt": [true]}', "list of token ids"),
        ('{"prompt": "a\\ud800"}', "lone surrogate"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"content": "a"}]}', "has no role"),
        ('{"prompt": "a", "id": [1]}', "its id is"),
        ('{"prompt": "a", "id": "same"}', "that of line 1 too"),
        ('{"prompt": "a", "temprature": 1}', "a field 'temprature'"),
        ('{"prompt": "a", "logprobs": 1}', "a field 'logprobs'"),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature is 'hot'"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt": "a", "stop": 5}', "its stop is 5"),
        ('{"prompt": "a", "stop": [5]}', "stop must be"),
        ('{"prompt": "a", "stop_token_ids": [-1]}', "stop_token_ids is -1"),
    ],
)
def test_a_bad_line_is_refused_by_number(line, says, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text(f'{{"prompt": "fine", "id": "same"}}\n\n{line}\n')
    with pytest.raises(ConfigError, match="line 3: ") as refusal:
        read_rows(source)
    assert says in str(refusal.value)
    assert str(refusal.value).endswith("Nothing was run.")


def test_all_lines_are_checked(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n\xff\n{\n{}\n')
    with pytest.raises(ConfigError, match=r"line 2: it is not UTF-8 .* 2 more lines are bad"):
        read_rows(source)
    source.write_text("\n \n")
    with pytest.raises(ConfigError, match="has no prompts"):
        read_rows(source)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path)


def test_files_as_other_systems_write_them(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "\xe4\xbd\xa0"}\r\n{"prompt": "a\xe2\x80\xa8b"}')
    assert [row.prompt for row in read_rows(source)] == ["你", "a\u2028b"]


# -- what is cut off goes on ---------------------------------------------------------------------


@given(st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, data):
    target = tmp_path_factory.mktemp("cut") / "answers.jsonl"
    with Answers(target, ABOUT) as answers:
        for line in (3, 1, 2):
            answers.add(line, {"text": f"{line}\u2028é"})
    journal = target.with_name("answers.jsonl.part")
    whole = journal.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    journal.write_bytes(whole[:cut])
    kept = max(whole[:cut].count(b"\n") - 1, 0)
    with Answers(target, ABOUT) as answers:
        assert [line in answers for line in (3, 1, 2)] == [i < kept for i in range(3)]
        for line in (1, 2, 3):
            if line not in answers:
                answers.add(line, {"text": f"{line}\u2028é"})
        answers.finish([1, 2, 3])
    assert [json.loads(line)["line"] for line in target.read_bytes().splitlines()] == [1, 2, 3]
    assert not journal.exists()


def test_nothing_finished_is_overwritten(tmp_path):
    target = tmp_path / "answers.jsonl"
    with Answers(target, ABOUT) as answers:
        answers.add(1, {"text": "a"})
        with pytest.raises(ConfigError, match="Another process"), Answers(target, ABOUT):
            pass
    with pytest.raises(ConfigError, match="differs in model"), Answers(target, {"model": "other"}):
        pass
    with Answers(target, ABOUT) as answers:
        answers.finish([1])
    with pytest.raises(ConfigError, match="exists"), Answers(target, ABOUT):
        pass
    with pytest.raises(ConfigError, match="cannot be written"), Answers(target / "x", ABOUT):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b"another program's download",
        b"5\n",
        b"null\n",
        b"[]\n",
        b"\xff\n",
        b'{"model": "toy"}\n5\n',
        b'{"model": "toy"}\n{"x": 1}\n',
        b'{"model": "toy"}\n' + b"[" * 100_000 + b"\n",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path, content):
    journal = tmp_path / "movie.part"
    journal.write_bytes(content)
    with (
        pytest.raises(ConfigError, match=r"movie\.part is no journal .* --output"),
        Answers(tmp_path / "movie", ABOUT),
    ):
        pass
    assert journal.read_bytes() == content


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "answers.jsonl"
    with Answers(target, ABOUT) as answers:
        answers.add(1, {"text": "a"})
        target.write_text("precious")
        with pytest.raises(ConfigError, match=r"exists: move it away"):
            answers.finish([1])
    assert target.read_text() == "precious"
    target.unlink()
    with Answers(target, ABOUT) as answers:
        answers.finish([1])
    assert read(target) == [{"line": 1, "text": "a"}]
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("name", [".", "..", "/", "link"])
def test_an_output_that_can_be_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="exists"), Answers(Path(name), ABOUT):
        pass


def test_a_lock_on_a_journal_that_was_removed_is_not_taken(tmp_path, monkeypatch):
    """Another run finishes between our opening of its journal and our lock on it."""
    target = tmp_path / "answers.jsonl"
    monkeypatch.setattr(fcntl, "flock", lambda *_: Path(f"{target}.part").unlink())
    with pytest.raises(ConfigError, match="Another process"), Answers(target, ABOUT):
        pass


def test_a_killed_run_goes_on_where_it_was(folder, tmp_path):
    rows = [{"prompt": [3 + i % 250], "max_tokens": 30, "ignore_eos": True} for i in range(800)]
    source, target = write(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    journal = tmp_path / "answers.jsonl.part"
    arguments = ["generate", str(folder), "--input", str(source), "--output", str(target)]
    arguments += ["--temperature", "0", "--dtype", "float32", "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "nybble", *arguments])
    try:
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # The last line may be torn.
    before = journal.read_text().rpartition("\n")[0].splitlines()[1:]
    assert 19 <= len(before) < len(rows)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert f"{len(before):,} of 800 rows are answered already" in result.stderr
    made = 30 * (800 - len(before))
    assert f"{made:,} tokens in" in result.stderr
    after = target.read_text().splitlines()
    assert set(before) <= set(after)
    assert [json.loads(line)["line"] for line in after] == list(range(1, 801))
    repeated = {row["line"] % 250: row["text"] for row in map(json.loads, after)}
    assert all(row["text"] == repeated[row["line"] % 250] for row in map(json.loads, after))


# -- the command ---------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_rows_that_failed_are_counted_in_the_exit_code(folder, tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": [5] * 300}])
    result = run(folder, "--input", source, "--output", tmp_path / "a.jsonl", "--max-tokens", 3)
    assert result.exit_code == 1
    assert "1 of 2 rows could not be answered" in result.stderr
    assert [("error" in row) for row in read(tmp_path / "a.jsonl")] == [False, True]


def test_other_weights_under_the_same_name_do_not_go_on(tmp_path, monkeypatch):
    def cut_off(*_):
        raise ConfigError("cut off")

    folder = tmp_path / "model"
    folder.mkdir()
    toy.write_llama(folder)
    source, target = write(tmp_path / "p.jsonl", [{"prompt": "a"}]), tmp_path / "a.jsonl"
    arguments = [folder, "--input", source, "--output", target, "--max-tokens", 3]
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "run", cut_off)
        assert "cut off" in run(*arguments).stderr
    weights = toy.llama_weights(seed=7)
    toy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "differs in weights" in run(*arguments).stderr
    toy.write_llama(folder)
    assert run(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input", "p.jsonl"], "give both"),
        (["--output", "a.jsonl"], "give both"),
        (["hello", "--input", "p.jsonl", "--output", "a.jsonl"], "leave out PROMPT"),
        (["--json", "--input", "p.jsonl", "--output", "a.jsonl"], "leave out PROMPT"),
        (["--input", "p.jsonl", "--output", "./p.jsonl"], "one file"),
        (["--input", "none.jsonl", "--output", "a.jsonl"], "cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused_before_loading(arguments, says):
    result = run("demo", *arguments)
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.startswith("Error: ")
