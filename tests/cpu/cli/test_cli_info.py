"""`nybble info` and `nybble doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from nybble.cli import doctor, machine
from nybble.cli.app import app
from nybble.cli.info import collect
from nybble.cli.layout import count, size, table
from nybble.config import QuantConfig
from nybble.errors import ConfigError
from nybble.gptq.run import quantize_checkpoint

TOY = Path(__file__).parents[2] / "data" / "qwen1-plain"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_info_of_a_16_bit_folder() -> None:
    facts = json.loads(run("info", str(TOY), "--json").stdout)
    # 2 x 160 x 64 embeddings, 2 layers of 4 x 64 x 64 + 3 x 64 x 176 matrices, 192 biases and
    # 2 x 64 norms, and the last norm.
    parameters = 2 * 160 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 176 + 192 + 2 * 64) + 64
    assert facts["parameters"] == parameters
    assert facts["disk_bytes"] == 4 * parameters  # the toy is fp32
    assert facts["quantisation"] is None
    assert facts["tokenizer"] is False
    assert facts["kv_bytes_per_token"] == {"fp16": 512, "int8": 288, "int6": 224, "int4": 192}
    assert facts["architecture"]["layers"] == 2


def test_info_reads_no_weight(tmp_path: Path) -> None:
    """A file whose data is a hole: reading it all would show in the numbers, not reading cannot."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((TOY / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    length = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(header)
        file.truncate(length)
    assert collect(tmp_path, [])["parameters"] == collect(TOY, [])["parameters"]


def test_info_tells_the_dialect_and_what_fits(tmp_path: Path) -> None:
    config = QuantConfig(4, 32, desc_act=False, sym=True, checkpoint_format="gptq")
    quantize_checkpoint(TOY, tmp_path / "toy", config, [list(range(64))])
    memories = [machine.Memory("RAM", 10**9, 2 * 10**9), machine.Memory("GPU", 1000, 2000)]
    facts = collect(tmp_path / "toy", memories)
    assert facts["parameters"] == collect(TOY, [])["parameters"]
    assert facts["quantisation"] == {
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "act_order": False,
        "format_label": "gptq",
        "matrices": 10,
        "group_indices": True,
    }
    assert [fit["weights_fit"] for fit in facts["fits"]] == [True, False]
    assert facts["fits"][0]["context"] == {"fp16": 64, "int8": 64, "int6": 64, "int4": 64}
    page = run("info", str(tmp_path / "toy")).stdout
    assert "GPTQ, 4 bits, groups of 32, symmetric, no act-order, labelled v1" in page
    assert "missing: token ids only" in page


def test_info_never_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    for name in ("demo", "nobody/nothing", "modelscope:nobody/nothing"):
        result = run("info", name)
        assert result.exit_code == 1
        assert f"run `nybble pull {name}` first" in result.stderr


def test_doctor_tells_what_runs() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["packages"]["torch"]
    assert facts["kernels"]["cpu"]
    assert facts["threads"] >= 1
    assert 0 < facts["memory"][0]["free"] <= facts["memory"][0]["total"]
    assert f"Kernels          {facts['kernels']['cpu']}" in result.stdout


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["compiler"] is None
    assert facts["demo"] is False
    assert facts["kernels"]["cpu"] != "cpu"
    assert facts["kernels"]["refused"]
    advice = " ".join(facts["advice"])
    assert "C compiler" in advice
    assert "nybble pull demo" in advice


def test_doctor_says_why_faster_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = SimpleNamespace(refused=("cpu: its compiler fails: repair it.",))
    backend = SimpleNamespace(name="torch")
    monkeypatch.setattr(doctor, "choose_backend", lambda device: (backend, choice))
    result = run("doctor")
    assert "Faster kernels do not run. cpu: its compiler fails: repair it." in result.stdout
    assert "Nothing is missing" not in result.stdout


def test_doctor_overlooks_files_that_vanish(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "nybble.cli.doctor.os.walk", lambda folder: [(str(folder), [], ["gone", "there"])]
    )
    (tmp_path / "there").write_text("123")
    assert doctor._folder_bytes(tmp_path) == 3


def test_doctor_fails_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> None:
        raise ConfigError("no kernels")

    monkeypatch.setattr(doctor, "choose_backend", refuse)
    result = run("doctor")
    assert result.exit_code == 1
    assert "No kernels run here" in result.stdout


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (38.5e9, "38.5 GB"), (2.62144e6, "2.62 MB")],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_counts_and_tables() -> None:
    assert [count(n) for n in (999, 134_515_008, 72_287_920_128)] == [
        "999",
        "135 million",
        "72.3 billion",
    ]
    assert table([("a", "b"), ("long", "c")]) == "a     b\nlong  c"


def test_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": 4_000_000, "memory.current": 1_000_000}
    monkeypatch.setattr(machine, "_cgroup", files.get)
    assert machine.ram() == machine.Memory("RAM", 3_000_000, 4_000_000)
    monkeypatch.setattr(machine, "_cgroup", lambda name: None)
    assert machine.ram().total > 4_000_000
