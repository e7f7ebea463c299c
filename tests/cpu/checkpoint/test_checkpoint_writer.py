"""Writing model folders: the format's own library reads them; a broken-off one is not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nybble.checkpoint import Checkpoint, CheckpointWriter, files, read_json, writer
from nybble.checkpoint.header import DTYPES
from nybble.errors import CapacityError, CheckpointError


def numbers(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert left.contiguous().view(-1).view(torch.uint8).tolist() == (
        right.contiguous().view(-1).view(torch.uint8).tolist()
    )


def test_every_dtype_and_shape_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {str(dtype): numbers(6, dtype).reshape(2, 3) for dtype in DTYPES.values()}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(2, 0), "名": torch.ones(1)}
    tensors["transposed"] = torch.arange(6).reshape(2, 3).T
    tensors["slice"] = torch.arange(24).reshape(4, 6)[1:3, ::2]
    with CheckpointWriter(tmp_path / "model") as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
    found = load_file(tmp_path / "model/model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
        assert_same(Checkpoint.open(tmp_path / "model").tensor(name), tensor)


def test_shards_keep_to_their_size_and_are_indexed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10) for i in range(5)} | {"big": torch.randn(100)}
    with CheckpointWriter(tmp_path / "model", max_shard_bytes=80) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
    index = read_json(tmp_path / "model/model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "model" / shard, "pt") as file:
            assert torch.equal(file.get_tensor(name), tensors[name])
            assert file.metadata() == {"format": "pt"}
    assert len(Checkpoint.open(tmp_path / "model")) == len(tensors)


def test_a_full_header_opens_the_next_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_HEADER_ROOM", 256)
    with CheckpointWriter(tmp_path / "model") as out:
        for index in range(9):
            out.add(f"tensor.{index}", torch.full((2,), index))
    checkpoint = Checkpoint.open(tmp_path / "model")
    assert len({checkpoint.info(name).file for name in checkpoint.names()}) > 1
    assert [checkpoint.tensor(f"tensor.{i}")[0].item() for i in range(9)] == list(range(9))


def test_other_files_are_written_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    with CheckpointWriter(tmp_path / "model") as out:
        out.add_json("config.json", {"name": "千问", "eps": 1e-6})
        out.add_file(tmp_path / "qwen.tiktoken")
        out.add_text("README.md", "千问")
    assert (tmp_path / "model/README.md").read_text("utf-8") == "千问"
    assert read_json(tmp_path / "model/config.json") == {"name": "千问", "eps": 1e-6}
    assert (tmp_path / "model/qwen.tiktoken").read_bytes() == b"IQ== 0\n"
    assert sorted(os.listdir(tmp_path)) == ["model", "qwen.tiktoken"]


def test_nothing_stands_at_the_target_before_the_end(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model") as out:
        out.add("a", torch.ones(3))
        assert not (tmp_path / "model").exists()
        with pytest.raises(CheckpointError):
            Checkpoint.open(tmp_path / ".model.partial")
    assert "a" in Checkpoint.open(tmp_path / "model")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_no_debris(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "model") as out:
            out.add("a", torch.ones(3))
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_nothing_that_opens_and_the_next_one_clears_it(
    tmp_path: Path,
) -> None:
    program = """
import os, signal, sys, torch
from nybble.checkpoint import CheckpointWriter
with CheckpointWriter(sys.argv[1]) as out:
    out.add_json("config.json", {})
    out.add("a", torch.ones(300000))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "model")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".model.partial"]
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "model")
    (tmp_path / ".model.partial/folder").mkdir()
    with CheckpointWriter(tmp_path / "model") as out:
        out.add("b", torch.ones(1))
    assert Checkpoint.open(tmp_path / "model").names() == ["b"]
    assert os.listdir(tmp_path) == ["model"]


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model") as out:
        with (
            pytest.raises(CheckpointError, match="Another process is writing model in"),
            CheckpointWriter(tmp_path / "model"),
        ):
            pass
        out.add("a", torch.ones(1))
    assert "a" in Checkpoint.open(tmp_path / "model")


@pytest.mark.parametrize("a_third_begins", [False, True])
def test_a_lock_on_a_folder_that_has_been_renamed_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, a_third_begins: bool
) -> None:
    """The other writer finishes between our opening of its folder and our lock on it."""

    def finish_other(*_: object) -> None:
        (tmp_path / ".model.partial").rename(tmp_path / "model")
        if a_third_begins:
            (tmp_path / ".model.partial").mkdir()

    monkeypatch.setattr(files.fcntl, "flock", finish_other)
    with pytest.raises(CheckpointError, match="Another process"):
        CheckpointWriter(tmp_path / "model").__enter__()
    assert (tmp_path / "model").is_dir()


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_a_full_disk_is_a_capacity_error_without_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.os, "fsync", lambda _: fail(errno.ENOSPC))
    with (
        pytest.raises(CapacityError, match=r"disk is full.*free some space"),
        CheckpointWriter(tmp_path / "model") as out,
    ):
        out.add("a", torch.ones(3))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs an always full device")
def test_a_disk_that_fills_while_tensors_arrive(tmp_path: Path) -> None:
    def fill() -> None:
        with CheckpointWriter(tmp_path / "model") as out:
            out.add("a", torch.ones(1))
            out._shards[0].file.close()
            out._shards[0].file = Path("/dev/full").open("wb")  # noqa: SIM115
            out.add("b", torch.ones(100_000))

    with pytest.raises(CapacityError, match="disk is full"):
        fill()
    assert os.listdir(tmp_path) == []


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"file.*check the path"),
        CheckpointWriter(tmp_path / "file/model"),
    ):
        pass


def test_a_folder_that_holds_something_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"), CheckpointWriter(tmp_path / "notes"):
        pass
    assert (tmp_path / "notes/mine.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["notes"]


def write_number(folder: Path, value: int) -> None:
    with CheckpointWriter(folder) as out:
        out.add_json("config.json", {"value": value})
        out.add("a", torch.tensor([value]))


def test_an_empty_folder_is_replaced_by_the_whole_or_by_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: fail(errno.EIO))
        with pytest.raises(CheckpointError, match="check the path and the disk"):
            write_number(folder, 1)
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(folder) == []
    write_number(folder, 1)
    assert Checkpoint.open(folder).tensor("a").item() == 1
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_fills_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with CheckpointWriter(tmp_path / "model") as out:
            out.add("a", torch.ones(1))
            (tmp_path / "model").mkdir()
            (tmp_path / "model/mine.txt").touch()

    with pytest.raises(CheckpointError, match="is not empty"):
        write()
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == ["mine.txt"]


def test_a_mount_point_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "model")
    with pytest.raises(CheckpointError, match="a folder inside it"):
        CheckpointWriter(tmp_path / "model").__enter__()
    assert os.listdir(tmp_path) == []
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(CheckpointError, match="a folder inside it"):
        writer.check_target(tmp_path / "link")


def test_the_target_of_a_link_and_dots_in_a_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_number(tmp_path / "link", 1)
    write_number(tmp_path / "real/../dots", 2)
    assert sorted(os.listdir(tmp_path)) == ["dots", "link", "real"]
    assert Checkpoint.open(tmp_path / "real").tensor("a").item() == 1
    with pytest.raises(CheckpointError, match="/ is not empty"):
        write_number(Path("/"), 3)


def test_names_and_dtypes_that_a_file_cannot_hold(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model") as out:
        out.add("a", torch.ones(1))
        out.add_json("config.json", {})
        for name in ("a", "__metadata__"):
            with pytest.raises(CheckpointError, match="is taken"):
                out.add(name, torch.ones(1))
        with pytest.raises(CheckpointError, match=r"'x+'\.\.\. has 300,000 characters"):
            out.add("x" * 300_000, torch.ones(1))
        with pytest.raises(CheckpointError, match=r"torch\.complex64.*convert"):
            out.add("b", torch.ones(1, dtype=torch.complex64))
        for name in ("config.json", "../x.json", "a/b.json"):
            with pytest.raises(CheckpointError, match="plain name"):
                out.add_json(name, {})
        with pytest.raises(ValueError, match="JSON compliant"):
            out.add_json("nan.json", {"x": float("nan")})
    assert json.loads((tmp_path / "model/config.json").read_text()) == {}
