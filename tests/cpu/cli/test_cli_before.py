"""Commands look for the packages of an extra, and make their folders, before they measure."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from nybble.cli import app, extras, measuring
from nybble.cli.options import Running
from nybble.errors import ConfigError


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else name)


@pytest.mark.parametrize("command", [["speed"], ["serve", "http://127.0.0.1:9/v1"]])
def test_benchmarks(no_matplotlib, tmp_path, command):
    result = CliRunner().invoke(app.app, ["bench", *command, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "--out needs matplotlib: run `pip install '.[eval]'`" in result.stderr


def test_a_comparison(no_matplotlib, tmp_path):
    (tmp_path / "text").write_text("some text")
    with pytest.raises(ConfigError, match="--plot needs matplotlib"):
        measuring.compare("no", "no", tmp_path / "text", 8, Running(), tmp_path / "x.png", False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "score", "mmlu", "--predictions", "rows.jsonl"], "mmlu needs rapidfuzz"),
        (["eval", "score", "tools", "--predictions", "rows.jsonl"], "tools needs json5"),
        (["bench", "serve", "http://127.0.0.1:9/v1"], "bench serve needs httpx2"),
        (["eval", "report", "run"], "A report needs matplotlib"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"query": "?", "gt": "A", "prediction": "A"}')
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "run `pip install '.[" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "speed", "--out", "file/new"],
        ["bench", "serve", "http://127.0.0.1:9/v1", "--out", "file/new"],
        ["bench", "kernels", "--out", "file/new/rows.json"],
        ["compare", "no", "no", "--text", "file", "--plot", "file/new/x.png"],
    ],
)
def test_a_folder_that_cannot_be_made_is_said_first(monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("some text")
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 1
    assert "The folder file/new cannot be made (Not a directory)" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv-dtype", "bogus"], "--kv-dtype is 'bogus'"),
        (["--row", "1,6144:1:int8"], "give one context and one batch"),
        (["--row", "1:1:bogus"], "--row is '1:1:bogus'"),
    ],
)
def test_rows_that_are_none(options, says):
    result = CliRunner().invoke(app.app, ["bench", "speed", *options])
    assert result.exit_code == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["perplexity", "no"], "--window is 128 and --max-context 8"),
        (["compare", "no", "no"], "--window is 128 and --max-context 8"),
    ],
)
def test_windows_longer_than_the_context(tmp_path, command, says):
    (tmp_path / "text").write_text("some text")
    options = ["--text", str(tmp_path / "text"), "--window", "128", "--max-context", "8"]
    result = CliRunner().invoke(app.app, [*command, *options])
    assert result.exit_code == 1
    assert says in result.stderr


@pytest.mark.parametrize("origin", ["https://example.org/page", "https://example.org/", "foo"])
def test_origins_that_no_browser_sends(origin):
    result = CliRunner().invoke(app.app, ["serve", "demo", "--cors-origin", origin])
    assert result.exit_code == 1
    assert f"--cors-origin is {origin!r}" in result.stderr


def test_no_fewer_sweeps_than_none(tmp_path):
    result = CliRunner().invoke(app.app, ["quantize", "no", str(tmp_path), "--sweeps", "-1"])
    assert result.exit_code == 2


@pytest.mark.parametrize("group", [[], ["eval"], ["bench"]])
def test_the_lists_of_commands_are_not_cut(monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app.app, [*group, "--help"], terminal_width=80)
    assert "Commands:" in result.stdout
    assert "..." not in result.stdout.partition("Commands:")[2]
