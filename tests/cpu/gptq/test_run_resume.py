"""Runs of the quantiser that were broken off, and what stands in the way of going on."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nybble.config import QuantConfig
from nybble.errors import CapacityError, CheckpointError, ConfigError
from nybble.gptq import blocks, run
from nybble.gptq import journal as journal_module
from nybble.gptq.run import quantize_checkpoint

INT4 = QuantConfig(bits=4, group_size=32, desc_act=False, sym=True)
INT8 = replace(INT4, bits=8)


class Killed(BaseException):
    """What a test raises in place of a signal: nothing in the package may catch it."""


def break_off(source, target, windows, after: int) -> None:
    """Begin a run that ends with its matrix number `after`."""

    def interrupt(result, done, total):
        if done == after:
            raise Killed

    with pytest.raises(Killed):
        quantize_checkpoint(source, target, INT4, windows, progress=interrupt)


@pytest.mark.parametrize("after", [1, 4, 6, 12])
def test_an_interrupted_run_ends_with_the_same_bytes(llama, tmp_path, windows, content, after):
    whole, target = tmp_path / "whole", tmp_path / "out"
    quantize_checkpoint(llama, whole, INT4, windows)
    break_off(llama, target, windows, after)
    assert not target.exists()
    seen = []
    quantize_checkpoint(
        llama, target, INT4, windows, progress=lambda result, done, total: seen.append(result)
    )
    assert len(seen) == 12
    assert content(target) == content(whole)
    assert not list(tmp_path.glob(".*"))


def test_finished_layers_are_run_again_only_for_those_after_them(
    llama, tmp_path, windows, monkeypatch
):
    target, forward, calls = tmp_path / "out", blocks.Block.forward, []

    def interrupt(*_):
        raise Killed

    def counted(*arguments):
        calls.append(arguments)
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_folder", interrupt)
        with pytest.raises(Killed):
            quantize_checkpoint(llama, target, INT4, windows)
    (tmp_path / ".out.quantizing" / "layer-00001.safetensors").unlink()
    monkeypatch.setattr(blocks.Block, "forward", counted)
    quantize_checkpoint(llama, target, INT4, windows)
    assert len(calls) == 2 * len(windows)  # the first layer, in both streams


CHILD = """
import sys, os, signal
from pathlib import Path
from nybble.config import QuantConfig
from nybble.gptq import journal, run
source, target, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
windows = [[int(i) for i in line.split()] for line in sys.stdin]

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def in_the_solver(result, done, total):
    if done == 2:
        kill()

def in_the_second_layer(result, done, total):
    if done == 7:
        kill()

progress = {"solver": in_the_solver, "layer": in_the_second_layer}.get(stop)
if stop == "writing":
    run.write_folder = kill
if stop == "saving":
    journal.os.fsync = kill
if stop == "removing":
    journal.Journal.remove = kill
run.quantize_checkpoint(source, target, QuantConfig(4, 32, False, True), windows, progress=progress)
"""


def test_sigkill_at_any_stage_changes_nothing(llama, tmp_path, windows, content):
    whole, target = tmp_path / "whole", tmp_path / "out"
    quantize_checkpoint(llama, whole, INT4, windows)
    text = "\n".join(" ".join(map(str, window)) for window in windows)
    for stop in ("solver", "saving", "layer", "writing", "removing"):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(llama), str(target), stop],
            input=text,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            check=False,
        )
        assert child.returncode == -signal.SIGKILL
        assert target.exists() == (stop == "removing")
    quantize_checkpoint(llama, target, INT4, windows)
    assert content(target) == content(whole)
    assert not list(tmp_path.glob(".*"))


def test_other_settings_do_not_continue_a_run(llama, tmp_path, windows):
    target = tmp_path / "out"
    break_off(llama, target, windows, after=5)
    with pytest.raises(ConfigError, match=r"differs in quant.*delete that folder"):
        quantize_checkpoint(llama, target, INT8, windows)
    with pytest.raises(ConfigError, match="differs in calibration"):
        quantize_checkpoint(llama, target, INT4, windows[:2])
    before = (llama / "config.json").read_text()
    (llama / "config.json").write_text(before.replace("1e-05", "1e-03"))
    with pytest.raises(ConfigError, match="differs in config"):
        quantize_checkpoint(llama, target, INT4, windows)
    (llama / "config.json").write_text(before)
    quantize_checkpoint(llama, target, INT4, windows)


def test_a_run_without_a_finished_layer_binds_nobody(llama, tmp_path, windows):
    target = tmp_path / "out"
    break_off(llama, target, windows, after=1)
    assert not list(tmp_path.glob(".*"))
    quantize_checkpoint(llama, target, INT8, windows)


def test_a_damaged_journal_is_named(llama, tmp_path, windows):
    target = tmp_path / "out"
    break_off(llama, target, windows, after=5)
    layer = tmp_path / ".out.quantizing" / "layer-00000.safetensors"
    layer.write_bytes(layer.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"layer-00000.*delete it"):
        quantize_checkpoint(llama, target, INT4, windows)
    layer.unlink()
    quantize_checkpoint(llama, target, INT4, windows)


def test_only_one_process_at_a_time(llama, tmp_path, windows):
    target = tmp_path / "out"

    def start_another(result, done, total):
        quantize_checkpoint(llama, target, INT4, windows)

    with pytest.raises(CheckpointError, match="Another process"):
        quantize_checkpoint(llama, target, INT4, windows, progress=start_another)


def test_a_lock_on_a_journal_that_was_removed_is_not_taken(tmp_path, monkeypatch):
    """Another run ends, and a third begins, between our opening of the folder and our lock."""

    def end_other(*_):
        shutil.rmtree(tmp_path / ".out.quantizing")
        (tmp_path / ".out.quantizing").mkdir()

    monkeypatch.setattr(fcntl, "flock", end_other)
    with pytest.raises(CheckpointError, match="Another process is quantising"):
        journal_module.Journal(tmp_path / "out", {}).__enter__()


def test_a_full_disk_leaves_the_finished_layers(llama, tmp_path, windows, monkeypatch):
    target = tmp_path / "out"
    real, calls = os.fsync, []

    def fail(handle):
        calls.append(handle)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(journal_module.os, "fsync", fail)
    with pytest.raises(CapacityError, match="disk is full"):
        quantize_checkpoint(llama, target, INT4, windows)
    assert (tmp_path / ".out.quantizing" / "layer-00000.safetensors").exists()
    assert not target.exists()
    quantize_checkpoint(llama, target, INT4, windows)
