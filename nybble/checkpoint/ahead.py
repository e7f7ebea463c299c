"""Reading ahead: the disk fetches the next tensors while those at hand are being unpacked."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nybble.checkpoint.files import file_errors
from nybble.checkpoint.header import TensorInfo
from nybble.errors import CheckpointError

# A mapped file is read by one page fault after the other, which leaves most of a disk idle.
_THREADS = 4
_BLOCK = 4 * 1024**2
_AHEAD = 1024**3


def read_ahead(
    groups: Sequence[Sequence[TensorInfo]], ahead: int = _AHEAD
) -> Generator[int, None, None]:
    """Give each group's index, in turn, once the system holds all its bytes in its file cache.

    Later groups are read meanwhile, until `ahead` bytes wait. What the disk cannot read raises
    a CheckpointError here, where a touch of the mapped file would kill the process.
    """
    sizes = [sum(info.nbytes for info in group) for group in groups]
    with ExitStack() as stack:
        handles = stack.enter_context(_opened({info.file for group in groups for info in group}))
        pool = ThreadPoolExecutor(_THREADS, "nybble-read")
        stack.callback(pool.shutdown, cancel_futures=True)
        buffers = threading.local()

        def begin(group: Sequence[TensorInfo]) -> list[Future[None]]:
            return [
                pool.submit(_read, info.file, handles[info.file], block, buffers)
                for info in group
                for block in _blocks(info)
            ]

        waiting: deque[list[Future[None]]] = deque()
        begun = 0
        for index in range(len(groups)):
            while begun < len(groups) and (not waiting or sum(sizes[index:begun]) < ahead):
                waiting.append(begin(groups[begun]))
                begun += 1
            for future in waiting.popleft():
                future.result()
            yield index


@contextmanager
def _opened(paths: set[Path]) -> Iterator[dict[Path, int]]:
    handles: dict[Path, int] = {}
    try:
        for path in paths:
            with file_errors(path):
                handles[path] = os.open(path, os.O_RDONLY)
        yield handles
    finally:
        for handle in handles.values():
            os.close(handle)


def _blocks(info: TensorInfo) -> Iterator[range]:
    end = info.start + info.nbytes
    return (range(first, min(first + _BLOCK, end)) for first in range(info.start, end, _BLOCK))


def _read(path: Path, handle: int, block: range, buffers: threading.local) -> None:
    """Read a block into a buffer that nobody looks at: what counts is the system's copy."""
    buffer = buffers.__dict__.setdefault("buffer", memoryview(bytearray(_BLOCK)))
    while block:
        with file_errors(path):
            count = os.preadv(handle, [buffer[: len(block)]], block.start)
        if not count:
            raise CheckpointError(f"{path} changed while it was in use: load it again.")
        block = block[count:]
