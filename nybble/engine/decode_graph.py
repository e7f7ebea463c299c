"""A decode step without the host: captured once in a CUDA graph, fed by the tokens it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from nybble.cache.store import KVStore
from nybble.config import KV_OPEN
from nybble.engine.scheduler import Chunk
from nybble.kernels.backend import Batch, OpenStep
from nybble.model.decoder import Decoder, Step
from nybble.model.rope import Positions

# Kernels share out their work by the longest context a graph may see: one graph a doubling
# keeps that close. Batches are padded, too: `padded` says to which sizes.
_SHORTEST = 1024


@cache
def _stream(device: torch.device) -> Any:
    """One for all engines of a GPU: libraries keep memory for each stream for good."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Capture:
    """Where graphs that run at different times are captured: one stream and one pool of memory.

    The warm-up runs on the same stream. A pool whose last graph is gone cannot be captured into
    again.
    """

    device: torch.device
    stream: Any
    pool: Any

    @classmethod
    def on(cls, device: torch.device) -> Capture:
        return cls(device, _stream(device), torch.cuda.graph_pool_handle())

    def emptied(self) -> Capture:
        """For the graphs that come after all that were captured here have been dropped."""
        return Capture(self.device, self.stream, torch.cuda.graph_pool_handle())


class DecodeGraph:
    """Greedy decoding of `sequences` sequences, one token each a replay.

    positions: factors by row; a sequence's position p has row first_rows + p. max_length bounds
    the keys while this graph is used. scratch_page, scratch_seat: of the store and owned by nobody,
    for the writes of rows without a sequence. capture: shared with graphs that run at other
    times. Whoever samples otherwise than greedily reads `logits` and loads other ids before the
    next replay.

    Buffers on the device, set by `load`: ids int64 (sequences,), the tokens to feed next; int32
    lengths, the keys that are cached, first_rows and seats (sequences,); pages (sequences, most
    pages).
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        positions: Positions,
        sequences: int,
        max_length: int,
        scratch_page: int,
        scratch_seat: int = 0,
        capture: Capture | None = None,
    ) -> None:
        device = decoder.backend.device
        pages = -(-max_length // store.page_size)
        self.decoder, self.store, self.positions = decoder, store, positions
        self.max_length = max_length
        self.ids = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.first_rows = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.seats = torch.full((sequences,), scratch_seat, dtype=torch.int32, device=device)
        self.pages = torch.full((sequences, pages), scratch_page, dtype=torch.int32, device=device)
        self.starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        self.logits = self._captured(capture)

    @torch.inference_mode()
    def load(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        pages: torch.Tensor,
        first_rows: torch.Tensor | None = None,
        seats: torch.Tensor | None = None,
    ) -> None:
        """Set which sequences run next, the first rows of the buffers; `pages` may be narrower."""
        count = len(ids)
        self.ids[:count].copy_(ids)
        self.lengths[:count].copy_(lengths)
        self.pages[:count, : pages.shape[1]].copy_(pages)
        if first_rows is not None:
            self.first_rows[:count].copy_(first_rows)
        if seats is not None:
            self.seats[:count].copy_(seats)

    def replay(self) -> None:
        """Feed `ids`, put the best next ones in their place; returns before it is done."""
        self._graph.replay()

    def _captured(self, capture: Capture | None) -> torch.Tensor:
        """Warm up (kernels compile, libraries allocate), then capture."""
        at = capture or Capture.on(self.ids.device)
        with torch.cuda.device(at.device):
            at.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(at.stream):
                for _ in range(2):
                    self._step()
            torch.cuda.current_stream().wait_stream(at.stream)
            self.lengths.zero_()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=at.pool, stream=at.stream):
                return self._step()

    @torch.inference_mode()
    def _step(self) -> torch.Tensor:
        size, at = self.store.page_size, self.lengths.long()
        page = self.pages.gather(1, (at // size)[:, None])[:, 0]
        batch = Batch(
            slots=(page * size + at % size).to(torch.int32),
            pages=self.pages,
            starts=self.starts,
            lengths=self.lengths + 1,
            max_query=1,
            max_length=self.max_length,
            open_step=self._open_step(at % size) if self.store.kind in KV_OPEN else None,
        )
        positions = self.positions.take(at + self.first_rows)
        logits = self.decoder.forward(self.ids, Step(positions, batch, self.store.layers))
        self.ids.copy_(logits.argmax(-1))
        self.lengths.add_(1)
        return logits

    def _open_step(self, offsets: torch.Tensor) -> OpenStep:
        """store.open_step of single tokens, on the device."""
        size = self.store.page_size
        batch = Batch(
            slots=(self.seats * size + offsets).to(torch.int32),
            pages=self.seats[:, None],
            starts=self.starts,
            lengths=(offsets + 1).to(torch.int32),
            max_query=1,
            max_length=size,
        )
        return OpenStep(batch)


class DecodeGraphs:
    """The graphs of one engine, captured when first needed: by batch size and longest context."""

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        scratch_page: int,
        scratch_seat: int,
        graph_type: type[DecodeGraph] = DecodeGraph,
    ) -> None:
        self.decoder, self.store = decoder, store
        self.scratch_page, self.scratch_seat = scratch_page, scratch_seat
        self._graph_type = graph_type
        device = decoder.backend.device
        self._capture = Capture.on(device) if device.type == "cuda" else None
        self._positions: Positions | None = None
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}

    def run(
        self, chunks: Sequence[Chunk], positions: Positions, first_rows: Sequence[int]
    ) -> torch.Tensor:
        """fp32 logits (chunks, vocab) after the one token of each chunk."""
        if positions is not self._positions:  # the table moved: what was captured points nowhere
            self._graphs.clear()
            self._capture = self._capture and self._capture.emptied()
            self._positions = positions
        length = max(chunk.end for chunk in chunks)
        graph = self._graph(positions, padded(len(chunks)), bucket(length, _SHORTEST))
        width, device = -(-length // self.store.page_size), self.decoder.backend.device
        rows, idle = len(graph.ids), len(graph.ids) - len(chunks)

        def integers(values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        graph.load(
            integers([chunk.tokens[0] for chunk in chunks] + [0] * idle, torch.int64),
            integers([chunk.begin for chunk in chunks] + [0] * idle),
            page_table(chunks, rows, width, self.scratch_page).to(device),
            integers([*first_rows, *[0] * idle]),
            integers([chunk.sequence.seat for chunk in chunks] + [self.scratch_seat] * idle),
        )
        graph.replay()
        return graph.logits[: len(chunks)]

    def _graph(self, positions: Positions, sequences: int, length: int) -> DecodeGraph:
        key = (sequences, length)
        if key not in self._graphs:
            free = self.scratch_page, self.scratch_seat
            self._graphs[key] = self._graph_type(
                self.decoder, self.store, positions, sequences, length, *free, self._capture
            )
        return self._graphs[key]


def page_table(chunks: Sequence[Chunk], rows: int, width: int, unowned: int) -> torch.Tensor:
    """int32 (rows, width), on the CPU: the pages of each chunk's sequence, then `unowned`."""
    table = np.full((rows, width), unowned, np.int32)
    for row, chunk in enumerate(chunks):
        pages = chunk.sequence.pages[:width]
        table[row, : len(pages)] = pages
    return torch.from_numpy(table)


def padded(sequences: int) -> int:
    """Rows of the graph for so many: a power of two, or from 48 on halfway between two.

    Products of 48 and of 96 tokens take 8 and 20 % less time than those of 64 and 128.
    """
    rows = bucket(sequences, 1)
    halfway = rows * 3 // 4
    return halfway if halfway >= 48 and sequences <= halfway else rows


def bucket(number: int, least: int) -> int:
    """The smallest doubling of `least` that holds `number`."""
    while least < number:
        least *= 2
    return least
