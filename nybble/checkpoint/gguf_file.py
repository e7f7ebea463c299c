"""The metadata and tensors of a GGUF file, with clear errors.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read through the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nybble.checkpoint.files import file_errors, refuse_lfs_pointer, require_regular
from nybble.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import ReaderField, ReaderTensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and tensors of a GGUF file; tensors stay in the file until dequantised."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """The metadata value `key`; CheckpointError where it is missing or of another type."""
        value = self.values.get(key, default)
        if not isinstance(value, kind):
            raise self.unsupported(f"{key} is {value!r}, not of type {kind.__name__}")
        return value

    def unsupported(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {problem}; nybble imports plain Llama-shaped GGUF files only, "
            "so take the model's safetensors files instead."
        )


def open_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a GGUF file. CheckpointError: no such file, or a damaged one."""
    from gguf import GGUFReader

    require_regular(path)
    with file_errors(path):
        with path.open("rb") as file:
            head = file.read(64)
        refuse_lfs_pointer(path, head)
        if not head.startswith(b"GGUF"):
            raise CheckpointError(f"{path} is no GGUF file: give one, or download it again.")
        try:
            reader = GGUFReader(path)
            values = {key: _value(field) for key, field in reader.fields.items()}
        # The reader checks little: these are what damaged files have been seen to provoke.
        except (ValueError, LookupError, OverflowError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is cut off or damaged ({error}): download it again."
            ) from error
    return GGUFFile(path, values, {tensor.name: tensor for tensor in reader.tensors})


def _value(field: ReaderField) -> Any:
    from gguf import GGUFValueType

    value = field.contents()
    if field.types == [GGUFValueType.FLOAT32]:
        return float(str(np.float32(value)))  # 1e-5 as its author wrote it, not 9.99999974e-6
    return value
