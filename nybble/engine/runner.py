"""Runs what the scheduler planned: plain data -> tensors -> one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from nybble.cache.store import KVStore
from nybble.config import ModelConfig
from nybble.engine.decode_graph import DecodeGraphs, page_table
from nybble.engine.scheduler import Chunk
from nybble.kernels.backend import Batch
from nybble.model.decoder import Decoder, Step
from nybble.model.rope import Positions, make_positions

_LEAST_PAGES = 8
_LEAST_POSITIONS = 512


class Runner:
    """Owns the tensors behind a pool of `num_pages` pages, and the position factors.

    On the CPU the store grows with the highest page in use, so that memory follows need. On a
    GPU it is whole from the start, with one page more for the padding of decode graphs: what a
    graph has captured must not move.
    """

    def __init__(
        self, decoder: Decoder, kind: str, num_pages: int, page_size: int, seats: int
    ) -> None:
        self.device = decoder.backend.device
        self.num_pages = num_pages
        # The other kernels read device values on the host, which no graph can capture.
        captured = decoder.backend.name == "cuda"
        context = min(num_pages * page_size, decoder.config.max_context)
        least = context if captured else _LEAST_POSITIONS  # a table that grows costs all graphs
        self._positions = PositionTable(decoder.config, self.device, least)
        first = num_pages + 1 if captured else 0
        held = seats + 1 if captured else seats  # the padding of decode graphs has a seat, too
        self._store = KVStore(decoder.config, kind, first, self.device, page_size, held)
        self._graphs = DecodeGraphs(decoder, self._store, num_pages, seats) if captured else None

    def run(
        self, decoder: Decoder, chunks: Sequence[Chunk], every: Collection[int] = ()
    ) -> torch.Tensor:
        """fp32 logits (chunks, vocab): after the last token of each chunk.

        Of the chunks in `every` (their numbers), a row after each of their tokens instead.
        """
        self._positions.cover(chunks)
        if self._graphs is not None and all(len(chunk) == 1 for chunk in chunks):
            first_rows = [self._positions.first_row(chunk) for chunk in chunks]
            return self._graphs.run(chunks, self._positions.table, first_rows)
        self._reserve(max(max(chunk.sequence.pages) for chunk in chunks) + 1)
        step = Step(self._positions.rows(chunks), self._batch(chunks), self._store.layers)
        ids = [token for chunk in chunks for token in chunk.tokens]
        rows = self._integers(_rows(chunks, every)) if every else None
        return decoder.forward(torch.tensor(ids, device=self.device), step, rows)

    def _reserve(self, pages: int) -> None:
        held = self._store.num_pages
        if pages > held:
            self._store = self._store.grown(min(self.num_pages, max(pages, 2 * held, _LEAST_PAGES)))

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        size = self._store.page_size
        starts, lengths = [0], [chunk.end for chunk in chunks]
        for chunk in chunks:
            starts.append(starts[-1] + len(chunk))
        most = -(-max(lengths) // size)
        batch = Batch(
            slots=self._integers([slot for chunk in chunks for slot in chunk.slots(size)]),
            pages=page_table(chunks, len(chunks), most, unowned=0).to(self.device),
            starts=self._integers(starts),
            lengths=self._integers(lengths),
            max_query=max(map(len, chunks)),
            max_length=max(lengths),
        )
        spans = [(chunk.begin, chunk.end) for chunk in chunks]
        return self._store.opened(batch, spans, [chunk.sequence.seat for chunk in chunks])

    def _integers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def _rows(chunks: Sequence[Chunk], every: Collection[int]) -> list[int]:
    """Of the tokens of a step, those whose logits are wanted."""
    rows: list[int] = []
    end = 0
    for number, chunk in enumerate(chunks):
        end += len(chunk)
        rows += range(end - (len(chunk) if number in every else 1), end)
    return rows


class PositionTable:
    """The factors of every position met so far, one stretch of rows for each NTK alpha.

    least: rows that the first stretch has from the start.
    """

    def __init__(self, config: ModelConfig, device: torch.device, least: int) -> None:
        self._config, self._device, self._least = config, device, least
        self._length = 0
        self._first_rows: dict[float, int] = {}
        self.table = make_positions(config, 1.0, 0, device)

    def first_row(self, chunk: Chunk) -> int:
        """The row of `table` that position 0 of the chunk's sequence has."""
        return self._first_rows[chunk.sequence.alpha]

    def rows(self, chunks: Sequence[Chunk]) -> Positions:
        """The factors of all tokens of the chunks, row by row."""
        rows: list[int] = []
        for chunk in chunks:
            first = self.first_row(chunk)
            rows.extend(range(first + chunk.begin, first + chunk.end))
        return self.table.take(torch.tensor(rows, device=self._device))

    def cover(self, chunks: Sequence[Chunk]) -> None:
        """Make sure that `table` has every position of the chunks; it may become another one."""
        alphas = {chunk.sequence.alpha for chunk in chunks}
        length = max(chunk.end for chunk in chunks)
        if length > self._length or not alphas <= self._first_rows.keys():
            self._build([*self._first_rows, *sorted(alphas - self._first_rows.keys())], length)

    def _build(self, alphas: list[float], length: int) -> None:
        if length > self._length:
            self._length = max(length, 2 * self._length, self._least)
        self._first_rows = {alpha: i * self._length for i, alpha in enumerate(alphas)}
        parts = (make_positions(self._config, a, self._length, self._device) for a in alphas)
        self.table = Positions.joined(list(parts))
