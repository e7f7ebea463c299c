"""Commands that draw look for matplotlib before they measure."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from nybble.cli import app, measuring, plots
from nybble.cli.options import Running
from nybble.errors import ConfigError


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)


@pytest.mark.parametrize("command", [["speed"], ["serve", "http://127.0.0.1:9/v1"]])
def test_benchmarks(no_matplotlib, tmp_path, command):
    result = CliRunner().invoke(app.app, ["bench", *command, "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "--out needs matplotlib: pip install matplotlib." in result.stderr


def test_a_comparison(no_matplotlib, tmp_path):
    (tmp_path / "text").write_text("some text")
    with pytest.raises(ConfigError, match="--plot needs matplotlib"):
        measuring.compare("no", "no", tmp_path / "text", 8, Running(), tmp_path / "x.png", False)
