"""Compiled code in the user's cache: a checksum behind it, and never half a file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from nybble.paths import cache_dir

_DIGEST_BYTES = hashlib.sha256().digest_size


def kernel_path(name: str) -> Path:
    return cache_dir() / "kernels" / name


def read_checked(path: Path) -> bytes | None:
    """The code in a file, or None where there is none that can be read or it was damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    code, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def write_checked(path: Path, code: bytes) -> None:
    """Other processes may write the same file now: the last complete one stays. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code + hashlib.sha256(code).digest())
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):  # renamed already
            os.unlink(partial)
        raise
