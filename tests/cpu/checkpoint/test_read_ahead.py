"""Reading ahead: each byte before it is wanted, not too many, and what fails is said."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import write_llama

from nybble.checkpoint import Checkpoint, ahead
from nybble.checkpoint.header import TensorInfo
from nybble.errors import CheckpointError

BLOCK = 64


def info(path: Path, start: int, size: int) -> TensorInfo:
    return TensorInfo(torch.uint8, (size,), path, start, size)


class Disk:
    """Notes which bytes were read, and reads at most 40 at a time as a disk may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: set[int] = set()
        self._preadv = os.preadv
        monkeypatch.setattr(ahead, "_BLOCK", BLOCK)
        monkeypatch.setattr(ahead.os, "preadv", self.preadv)

    def preadv(self, handle: int, buffers: list[Any], offset: int) -> int:
        count = self._preadv(handle, [buffers[0][:40]], offset)
        self.read.update(range(offset, offset + count))
        return count


@given(
    sizes=st.lists(st.lists(st.integers(0, 3 * BLOCK), max_size=3), max_size=6),
    window=st.integers(1, 8 * BLOCK),
)
def test_a_group_is_given_once_all_of_it_was_read_and_not_much_more(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], window: int
) -> None:
    path = tmp_path_factory.mktemp("ahead") / "file"
    path.write_bytes(bytes(sum(map(sum, sizes))))
    groups, end = [], 0
    for group in sizes:
        starts = [end + sum(group[:index]) for index in range(len(group))]
        groups.append([info(path, *span) for span in zip(starts, group, strict=True)])
        end += sum(group)
    ends = [sum(map(sum, sizes[: index + 1])) for index in range(len(sizes))]
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch)
        for expected, index in enumerate(ahead.read_ahead(groups, window)):
            assert index == expected
            assert disk.read >= set(range(ends[index]))
            limit = ends[index] - sum(sizes[index]) + window
            allowed = next((e for e in ends[index:] if e >= limit), end)
            assert max(disk.read, default=-1) < max(allowed, ends[index])
    assert disk.read == set(range(end))


def test_what_the_disk_cannot_read_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_engine: Any
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    folder = write_llama(tmp_path)
    monkeypatch.setattr(ahead.os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"model.safetensors: Input/output error; check"):
        make_engine(folder)


def test_a_file_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_llama(tmp_path))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="changed while it was in use"):
        list(checkpoint.read_ahead([checkpoint.names()]))


def test_an_early_end_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_llama(tmp_path))
    handles = Path("/proc/self/fd")
    with closing(checkpoint.read_ahead([[name] for name in checkpoint.names()])) as ready:
        assert next(ready) == 0
    assert tmp_path / "model.safetensors" not in [
        Path(os.path.realpath(h)) for h in handles.iterdir()
    ]
    assert not [t for t in threading.enumerate() if t.name.startswith("nybble-read")]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone does not exist"):
        next(ahead.read_ahead([[info(tmp_path / "gone", 0, 1)]]))
