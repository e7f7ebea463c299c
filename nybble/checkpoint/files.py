"""Files of a model folder: opened with clear errors, never outside the folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nybble.errors import CapacityError, CheckpointError

Progress = Callable[[int, int], None]
"""Called with (done, total) in the unit that the called function documents."""

_LFS_MAGIC = b"version https://git-lfs"


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into an error that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: check the path, or download the model again."
        ) from error
    except PermissionError as error:
        raise CheckpointError(
            f"{path}: permission denied; change its owner or mode, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"The disk is full while writing {path}: free some space and try again."
            ) from error
        raise CheckpointError(
            f"{path}: {error.strerror or error}; check the path and the disk, then try again."
        ) from error


def require_regular(path: Path) -> None:
    """Refuse a missing file and whatever is not a plain file (a folder, a pipe, a device)."""
    with file_errors(path):
        mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a plain file: replace it with the model's own file.")


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Refuse a Git-LFS pointer, known by the first bytes of the file."""
    if head.startswith(_LFS_MAGIC):
        raise CheckpointError(
            f"{path} is a Git-LFS pointer, not the file itself: "
            f"run `git lfs pull` in {path.parent}, or download the model again."
        )


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a checkpoint folder; a name that leads elsewhere is refused.

    Links may point to a file of the same folder, or, in a hub cache (`snapshots/<revision>`),
    to the repository's own `blobs`.
    """
    plain = name == Path(name).name and name not in ("", "..") and name.isprintable()
    if not plain or "\\" in name:
        raise CheckpointError(
            f"{folder} names the file {name!r}, which is no plain file name: "
            "such a checkpoint is not to be trusted; download the original again."
        )
    path = folder / name
    roots = [Path(os.path.realpath(folder))]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path} is a link that leaves the model's folder, to {target}: "
            "put the file itself into the folder."
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. CheckpointError: missing, no UTF-8, no JSON, no object, a link
    that leaves its folder."""
    require_regular(inside(path.parent, path.name))
    with file_errors(path):
        data = path.read_bytes()
    refuse_lfs_pointer(path, data)
    return parse_json(data, str(path))


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """`data` as a JSON object without duplicate keys; `source` is named in the errors."""
    try:
        parsed = json.loads(data.decode(), object_pairs_hook=_unique_object)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}"
    except RecursionError:
        problem = "holds JSON that is nested too deeply"
    except ValueError as error:
        problem = f"is not valid JSON ({error})"
    else:
        if isinstance(parsed, dict):
            return parsed
        problem = "does not hold a JSON object"
    raise CheckpointError(f"{source} {problem}: download it again.")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {twice!r} stands in it twice")
    return result


def lock(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """Lock a file or folder for this process; None where another process has the lock.

    The handle, opened with `flags`, holds the lock until it is closed.
    """
    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may have renamed or removed it between our open and our lock.
        ours = os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if ours:
        return handle
    os.close(handle)
    return None


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
