"""A model folder as named tensors: sharded or single safetensors, memory-mapped and lazy."""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path

import torch

from nybble.checkpoint.ahead import read_ahead
from nybble.checkpoint.files import file_errors, inside, read_json
from nybble.checkpoint.header import TensorInfo, read_header
from nybble.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Without it the kernel may refuse a private mapping larger than its memory. Python names the
# constant from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Checkpoint:
    """The tensors of one folder. Opening reads headers only; a tensor is read when touched."""

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self._tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of `folder`: an index and its shards, or one .safetensors file.

        Everything is checked against the files' true sizes here, so that a missing shard or a
        broken download is found before the first weight is read. CheckpointError says which
        file, which tensor and what to do.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: give the folder of a model.")
        index = _pick(folder, "*.safetensors.index.json", _INDEX)
        if index is not None:
            return cls(folder, _sharded(folder, index))
        single = _pick(folder, "*.safetensors", _SINGLE)
        if single is None:
            raise _no_weights(folder)
        return cls(folder, read_header(inside(folder, single.name)))

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    def info(self, name: str) -> TensorInfo:
        """dtype, shape and place of a tensor, from the header alone."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}: the weights do not belong to this "
                "config.json, or the folder is incomplete; download the model again."
            ) from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, as a view of the mapped file: no byte is read before its use.

        Treat it as read-only. A write would stay in this process and never reach the file, but
        be seen by everyone who asks for the same name. The file must not shrink meanwhile.
        """
        info = self.info(name)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        data = torch.frombuffer(
            self._map(info), dtype=torch.uint8, count=info.nbytes, offset=info.start
        )
        if data.data_ptr() % info.dtype.itemsize:
            data = data.clone()  # the format does not promise alignment
        return data.view(info.dtype).reshape(info.shape)

    def expect(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        dtypes: Iterable[torch.dtype] | None = None,
    ) -> torch.Tensor:
        """`tensor(name)`, or a CheckpointError where its shape or dtype is another."""
        info = self.info(name)
        wanted = tuple(dtypes) if dtypes is not None else (info.dtype,)
        if shape is not None and info.shape != tuple(shape):
            found, expected = str(info.shape), str(tuple(shape))
        elif info.dtype not in wanted:
            found, expected = str(info.dtype), " or ".join(str(dtype) for dtype in wanted)
        else:
            return self.tensor(name)
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {found} where {expected} is expected; take "
            "config.json and the weights from the same model and revision."
        )

    def fingerprint(self) -> str:
        """Tells one set of weights from another by names, shapes and samples, not by all bytes."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            info = self._tensors[name]
            digest.update(f"{name!r} {info.dtype} {info.shape}".encode())
            first = self.tensor(name).flatten()[:1024].contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def read_ahead(self, groups: Sequence[Sequence[str]]) -> Generator[int, None, None]:
        """Give the index of each group of names, in turn, once its tensors are in memory.

        Those of the next groups are read from the disk meanwhile. Close it to end early.
        """
        return read_ahead([[self.info(name) for name in group] for group in groups])

    def release(self, name: str) -> None:
        """Give the memory of a tensor that has been used back; a later use reads it again."""
        info = self.info(name)
        mapped = self._maps.get(info.file)
        first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (info.start + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if mapped is not None and length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, first, length)

    def _map(self, info: TensorInfo) -> mmap.mmap:
        if info.file not in self._maps:
            with file_errors(info.file):
                self._maps[info.file] = _map_file(info.file)
        mapped = self._maps[info.file]
        if len(mapped) < info.start + info.nbytes:
            raise CheckpointError(f"{info.file} changed while it was in use: load it again.")
        return mapped


def _map_file(path: Path) -> mmap.mmap:
    """Map copy-on-write: torch wants writable memory, and a stray write must not crash."""
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)


def _pick(folder: Path, pattern: str, preferred: str) -> Path | None:
    """The preferred file of a folder, or the only one that fits the pattern."""
    with file_errors(folder):
        found = sorted(folder.glob(pattern))
    if len(found) > 1:
        found = [path for path in found if path.name == preferred] or found
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} {pattern} files and no {preferred}: "
            f"add {_INDEX}, which says how they belong together, or keep one of them."
        )
    return found[0] if found else None


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds its weights as {pickles[0].name}, a pickle, which can run any code "
            "when it is read: convert it to safetensors, or download a copy that has them."
        )
    return CheckpointError(
        f"{folder} holds no .safetensors file: give a model's folder, or download it again."
    )


def _sharded(folder: Path, index: Path) -> dict[str, TensorInfo]:
    """The tensors that the shards hold; where two hold a name, the index must decide."""
    weight_map = _weight_map(inside(folder, index.name))
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = inside(folder, shard)
        if not os.path.lexists(path):
            raise CheckpointError(
                f"{path} is missing, one of the shards that {index.name} names: "
                "download it, or the whole model again."
            )
        found = {n: i for n, i in read_header(path).items() if weight_map.get(n, shard) == shard}
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(
                f"{tensors[twice[0]].file} and {shard} both hold a tensor {twice[0]!r}, and "
                f"{index.name} does not say which one counts: download the model again."
            )
        tensors |= found
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / shard} has no tensor {name!r}, which {index.name} says it holds: "
                "take both from the same revision of the model."
            )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor that an index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index} names no file for {name!r}: download it again.")
    return weight_map
