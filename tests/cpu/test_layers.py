"""Arrows point only down: no module imports from its own layer's siblings or from above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nybble"
# Lowest first. A part may import itself and whatever stands on an earlier line.
LAYERS = [
    {"errors", "address"},
    {"paths"},
    {"config", "sampling", "schema"},
    {"tokenizer", "tools", "checkpoint", "kernels"},
    {"quant", "cache"},
    {"model"},
    {"engine", "gptq"},
    {"demo", "outputs", "memory", "grammar"},
    {"resolve"},
    {"llm"},
    {"compat", "measure", "batch"},
    {"bench", "eval", "serve"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
# Tokenizer, pages and scheduler are bookkeeping; the rest is loaded to print the help.
WITHOUT_TORCH = (
    "tokenizer/",
    "tools/",
    "schema/",
    "cache/pages.py",
    "engine/scheduler.py",
    "errors.py",
    "config.py",
    "sampling.py",
    "paths.py",
    "address.py",
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> set[str]:
    """Every absolute module that the file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "nybble":
                found |= {f"nybble.{alias.name}" for alias in node.names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part_of(path)
    for module in imported_modules(path):
        part = [*module.split("."), ""][1]
        if module.startswith("nybble.") and part != own and part in RANK:
            assert RANK[part] < RANK[own], f"{own} imports {module}"


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_no_torch_here(part):
    files = [path for path in FILES if path.relative_to(PACKAGE).as_posix().startswith(part)]
    assert files
    for path in files:
        assert not any(m.split(".")[0] == "torch" for m in imported_modules(path))
