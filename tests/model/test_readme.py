"""Every command and every Python example of the READMEs runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found


def commands(path: Path) -> list[list[str]]:
    lines = "\n".join(blocks(path, "sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_both_languages_show_the_same_commands():
    english, chinese = (commands(path) for path in READMES)
    assert english == chinese
    assert blocks(READMES[0], "python")[1:] == blocks(READMES[1], "python")[1:]


@pytest.mark.parametrize("command", commands(READMES[0]), ids=" ".join)
def test_commands(command):
    if command[0] in ("git", "cd"):
        return  # whoever runs this has followed them
    # Run for real, make would set up the machine that is running this; CI does that.
    made = command[0] == "make"
    command = [*command, "--dry-run"] if made else [sys.executable, "-m", *command]
    run = subprocess.run(command, cwd=ROOT, input=b"/exit\n", capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert (run.stdout + run.stderr).strip()


@pytest.mark.parametrize("number", range(2))
def test_python_examples(number):
    run = subprocess.run(
        [sys.executable, "-c", blocks(READMES[0], "python")[number]],
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.strip()
