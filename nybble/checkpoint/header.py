"""The header of a safetensors file, checked in full before a tensor is touched.

Format: 8 bytes, the header's length N, little end first; N bytes of JSON, name -> dtype, shape
and data_offsets [begin, end) relative to byte 8 + N; then the data, without gaps to the end of
the file (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.checkpoint.files import file_errors, parse_json, refuse_lfs_pointer, require_regular
from nybble.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
MAX_DIMS = 64  # torch's own limit for most operators

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; its `nbytes` begin at byte `start` of `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name. CheckpointError where anything is amiss."""
    require_regular(path)
    with file_errors(path), path.open("rb") as file:
        head = file.read(64)
        refuse_lfs_pointer(path, head)
        size = os.fstat(file.fileno()).st_size
        length = _header_length(path, head, size)
        file.seek(8)
        text = file.read(length)
    entries = parse_json(text, f"The header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its __metadata__ is no JSON object")
    data_start = 8 + length
    tensors = {name: _entry(path, name, entry, data_start) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start, size)
    return tensors


def _header_length(path: Path, head: bytes, size: int) -> int:
    if size == 0:
        raise _damaged(path, "it is empty")
    if size < 8:
        raise _damaged(path, f"its {size} bytes are less than a safetensors header")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header claims {length} bytes, so it is no safetensors file")
    if length > size - 8:
        raise _damaged(path, f"its header claims {length} bytes and the file has {size}")
    return length


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} needs dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has the dtype {entry['dtype']!r}, which nybble does not "
            f"read; convert the checkpoint to one of {', '.join(DTYPES)}."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has an impossible shape or data_offsets")
    begin, end = offsets
    # A size beyond int64 would overflow in torch even where another dimension is zero.
    if len(shape) > MAX_DIMS or math.prod(max(dim, 1) for dim in shape) * dtype.itemsize >= 2**63:
        raise _damaged(path, f"tensor {name!r} has an impossible shape")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _damaged(
            path, f"tensor {name!r} needs {nbytes} bytes and its data_offsets span {end - begin}"
        )
    return TensorInfo(dtype, tuple(shape), path, data_start + begin, nbytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """The tensors must fill the file from the header to its end: no gap, no overlap."""
    end = max((info.start + info.nbytes for info in tensors.values()), default=start)
    if end > size:
        raise CheckpointError(
            f"{path} is cut off: its header describes {end} bytes and the file has {size}; "
            "download it again."
        )
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != position:
            relation = "overlaps another" if info.start < position else "leaves a gap before it"
            raise _damaged(path, f"tensor {name!r} {relation}")
        position += info.nbytes
    if position != size:
        raise _damaged(path, f"{size - position} bytes follow the last tensor")


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {problem}; download it again.")
