"""Writing a model folder: streamed to disk, and complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from nybble.checkpoint.files import file_errors, lock, sync_folder
from nybble.checkpoint.header import DTYPES
from nybble.errors import CheckpointError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A shard's header stands first but is known last: room for it, spaces where it is shorter (the
# format allows them). With its 8 bytes of length it is a multiple of a memory page.
_HEADER_ROOM = 256 * 1024 - 8


class CheckpointWriter:
    """Write tensors one by one, and JSON and other files, into a new model folder.

        with CheckpointWriter(folder) as writer:
            writer.add_json("config.json", config)
            writer.add("lm_head.weight", weight)

    Everything goes into a hidden folder beside the target, which takes the target's name when
    the block ends; an exception removes it. What a killed process left is cleared away by the
    next one that writes the same folder. Memory: one tensor.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 2 * 1024**3) -> None:
        self.folder = Path(os.path.realpath(folder))
        self._partial = self.folder.parent / f".{self.folder.name}.partial"
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._shard_of: dict[str, int] = {}
        self._lock = -1

    def __enter__(self) -> CheckpointWriter:
        check_target(self.folder)
        with file_errors(self._partial):
            self._partial.mkdir(parents=True, exist_ok=True)
            handle = lock(self._partial)
            if handle is None:
                raise CheckpointError(
                    f"Another process is writing {self.folder.name} in {self.folder.parent}: "
                    "wait for it."
                )
            self._lock = handle
            _clear(self._partial)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        done = False
        try:
            if kind is None:
                with file_errors(self.folder):
                    self._finish()
                done = True
        finally:
            if not done:
                self._discard()
            os.close(self._lock)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor of any device and dtype that safetensors knows."""
        if name in self._shard_of or name == "__metadata__":
            raise CheckpointError(f"The tensor name {name!r} is taken: give each tensor its own.")
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"Tensor {name!r} has the dtype {tensor.dtype}, which safetensors files do not "
                "hold: convert it first."
            )
        with file_errors(self.folder):
            if not self._shards or not self._shards[-1].has_room(name, tensor):
                self._next_shard()
            self._shards[-1].append(name, tensor)
        self._shard_of[name] = len(self._shards) - 1

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, such as config.json; `name` is a plain file name."""
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self.add_text(name, text + "\n")

    def add_text(self, name: str, text: str) -> None:
        """Write a text file; `name` is a plain file name."""
        with file_errors(self.folder / name):
            self._new_path(name).write_text(text, encoding="utf-8")

    def add_file(self, source: Path) -> None:
        """Copy a file, such as qwen.tiktoken, under its own name."""
        with file_errors(source):
            shutil.copyfile(source, self._new_path(source.name))

    def _new_path(self, name: str) -> Path:
        path = self._partial / name
        if path.parent != self._partial or path.exists():
            raise CheckpointError(
                f"{name!r} cannot be written to {self.folder}: give each file its own plain name."
            )
        return path

    def _next_shard(self) -> None:
        if self._shards:
            self._shards[-1].finish()
        path = self._partial / f"{len(self._shards) + 1}.shard"
        self._shards.append(_Shard(path, self._max_shard_bytes))

    def _finish(self) -> None:
        if self._shards:
            self._shards[-1].finish()
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for shard, name in zip(self._shards, names, strict=True):
            shard.path.rename(self._new_path(name))
        if count > 1:
            total = sum(shard.nbytes for shard in self._shards)
            weight_map = {name: names[index] for name, index in self._shard_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.add_json("model.safetensors.index.json", index)
        for path in self._partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(self._partial)
        check_target(self.folder)
        self._partial.rename(self.folder)  # of an empty folder it takes the place
        sync_folder(self.folder.parent)

    def _discard(self) -> None:
        for shard in self._shards:
            with suppress(OSError):  # a last flush onto a full disk; the file goes anyway
                shard.file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


def check_target(folder: Path) -> None:
    """CheckpointError unless a new model can take this name: a free one, or an empty folder's."""
    folder = Path(os.path.realpath(folder))
    with file_errors(folder):
        if folder.exists() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty: choose another folder.")
        if folder.is_mount():
            raise CheckpointError(
                f"{folder} is where a disk is mounted, whose name no other folder can take: "
                "name a folder inside it."
            )


class _Shard:
    """One safetensors file that grows by one tensor at a time."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._entries: list[str] = ['"__metadata__":{"format":"pt"}']
        self._header_bytes = len(self._entries[0]) + 2
        self.file: BinaryIO = path.open("wb")
        self.file.seek(8 + _HEADER_ROOM)

    def has_room(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the tensor fits; into an empty shard goes one of any size."""
        fits = self._in_header(self._entry(name, tensor))
        return fits and (self.nbytes == 0 or self.nbytes + tensor.nbytes <= self._max_bytes)

    def append(self, name: str, tensor: torch.Tensor) -> None:
        entry = self._entry(name, tensor)
        if not self._in_header(entry):
            raise CheckpointError(
                f"The tensor name {name[:40]!r}... has {len(name):,} characters, more than the "
                "header of a file has room for: give it a shorter one."
            )
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        self.file.write(flat.numpy().data)
        self._entries.append(entry)
        self._header_bytes += len(entry) + 1
        self.nbytes += tensor.nbytes

    def finish(self) -> None:
        header = ("{" + ",".join(self._entries) + "}").encode().ljust(_HEADER_ROOM)
        self.file.seek(0)
        self.file.write(_HEADER_ROOM.to_bytes(8, "little") + header)
        self.file.close()

    def _in_header(self, entry: str) -> bool:
        return self._header_bytes + len(entry) + 1 <= _HEADER_ROOM

    def _entry(self, name: str, tensor: torch.Tensor) -> str:
        entry = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.nbytes, self.nbytes + tensor.nbytes],
        }
        return f"{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}"


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
