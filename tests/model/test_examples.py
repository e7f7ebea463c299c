"""Every example runs, on the demo. (quickstart_card.py names the 72B: tests/cpu/test_compat.py.)"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "chat.py": r"Paris",
    "stream.py": r"\w+ \w+ \w+",
    "token_ids.py": r"' Paris",
}


def test_every_example_is_run_somewhere() -> None:
    found = {path.name for path in EXAMPLES.glob("*.py")}
    assert found == SAYS.keys() | {"quickstart_card.py"}


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[name], done.stdout)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < 40
