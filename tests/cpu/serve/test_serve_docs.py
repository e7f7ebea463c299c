"""What README.md and docs/serving.md say of the server is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serving
from typer.testing import CliRunner

from nybble.cli.app import app

ROOT = Path(__file__).parents[3]


def test_the_example_of_the_readme(llm):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "OpenAI(" in block)
    with serving(llm, names=("demo",)) as server:
        code = code.replace("http://127.0.0.1:8000", server.url)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert run.returncode == 0, run.stderr.decode()
        assert run.stdout.strip()


def test_the_routes(http):
    text = (ROOT / "docs" / "serving.md").read_text()
    table = text.split("## Routes")[1].split("##")[0]
    described = set(re.findall(r"(?:`|, |POST |GET )(/[\w/{}]+)`", table))
    served = {path.replace("{name}", "{id}") for path in http.get("/openapi.json").json()["paths"]}
    assert served <= described


@pytest.mark.parametrize(
    "flag", re.findall(r"`(--[a-z-]+)", (ROOT / "docs/serving.md").read_text())
)
def test_the_flags(flag):
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"})
    assert flag in result.output
