"""`nybble doctor`: what this machine has, what will run on it, and what is missing."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from nybble import demo
from nybble.cli import machine
from nybble.cli.layout import size, table
from nybble.errors import NybbleError
from nybble.kernels import choose_backend
from nybble.kernels.cpu.compile import find_compiler
from nybble.paths import cache_dir

_PACKAGES = (
    *("nybble", "torch", "numpy", "safetensors", "tokenizers", "tiktoken", "jinja2"),
    *("huggingface-hub", "gguf", "triton", "modelscope"),
)
_NOT_NEEDED = {"triton": "only for NVIDIA GPUs", "modelscope": "only for --source modelscope"}


def run(as_json: bool) -> None:
    facts = collect()
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _page(facts))
    if not facts["kernels"]:
        raise typer.Exit(1)


def collect() -> dict[str, Any]:
    """Everything `doctor` tells, in the form that --json prints."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": machine.cpu_model(),
        "cpu_features": machine.cpu_features(),
        "cores": machine.usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": [vars(memory) for memory in (machine.ram(), *machine.gpus())],
        "compiler": _compiler(),
        "cache": {"folder": str(cache_dir()), "bytes": _folder_bytes(cache_dir())},
        "demo": demo.location("demo").is_dir(),
        "kernels": _kernels(),
    }
    return facts | {"advice": _advice(facts)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """The C compiler that the kernels are compiled with."""
    try:
        return " ".join(find_compiler())
    except NybbleError:
        return None


def _folder_bytes(folder: Path) -> int:
    """Bytes in a folder, less the files that vanish meanwhile."""
    found = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.lstat(Path(root) / name).st_size
    return found


def _kernels() -> dict[str, Any] | None:
    """The kernels that run on the CPU and why faster ones were refused; None if none runs."""
    try:
        backend, choice = choose_backend("cpu")
    except NybbleError:
        return None
    return {"cpu": backend.name, "refused": list(choice.refused)}


def _advice(facts: dict[str, Any]) -> list[str]:
    """What is missing and how to get it."""
    advice = []
    for name, found in facts["packages"].items():
        if found is None and name not in _NOT_NEEDED:
            advice.append(f"The package {name} is missing: run `pip install {name}`.")
    if facts["compiler"] is None:
        advice.append(
            "There is no C compiler, and without it the CPU is slower: install one, for example "
            "with `apt-get install gcc`, or name it in CC."
        )
    elif facts["kernels"] is not None:
        advice += [f"Faster kernels do not run. {why}" for why in facts["kernels"]["refused"]]
    if facts["kernels"] is None:
        advice.append("No kernels run here: install nybble again, into a fresh environment.")
    if not facts["demo"]:
        advice.append("The demo model is not here yet: `nybble pull demo` fetches it (93 MB).")
    return advice


# -- the page for people ------------------------------------------------------------------------


def _page(facts: dict[str, Any]) -> str:
    rows = [
        ("Python", f"{facts['python']}, {facts['system']}"),
        *((name, _version_text(name, found)) for name, found in facts["packages"].items()),
        ("CPU", facts["cpu"]),
        ("  features", ", ".join(facts["cpu_features"]) or "not known"),
        ("  cores", f"{facts['cores']} usable, {facts['threads']} threads"),
        *((m["name"], f"{size(m['free'])} free of {size(m['total'])}") for m in facts["memory"]),
        ("C compiler", facts["compiler"] or "none"),
        *_kernel_rows(facts["kernels"]),
        ("Cache", f"{facts['cache']['folder']}, {size(facts['cache']['bytes'])}"),
        ("Demo model", "present" if facts["demo"] else "not fetched yet"),
    ]
    advice = facts["advice"] or ["Nothing is missing."]
    return "\n".join([table(rows), "", *advice])


def _version_text(name: str, found: str | None) -> str:
    return found or f"not installed ({_NOT_NEEDED.get(name, 'needed')})"


def _kernel_rows(kernels: dict[str, Any] | None) -> list[tuple[str, str]]:
    if kernels is None:
        return [("Kernels", "none")]
    return [("Kernels", kernels["cpu"]), *(("  refused", reason) for reason in kernels["refused"])]
