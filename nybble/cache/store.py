"""Where keys and values are kept between steps: pages of all layers, in one kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from nybble.cache.sizes import PAGE_SIZE, bytes_per_token, seat_bytes
from nybble.config import KV_OPEN, ModelConfig
from nybble.errors import CapacityError
from nybble.kernels.backend import KV_DTYPES, Batch, KVLayer, OpenStep, scales_shape, stored_width

_LEAST_PAGES = 8


class KVStore:
    """The pages of every layer, (num_pages, kv_heads, page_size, head_dim) each.

    Who owns which page is the business of the engine: the store only holds them. seats: how many
    sequences run at a time, each with an open page in 16 bits where the kind has such pages.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        num_pages: int,
        device: torch.device,
        page_size: int = PAGE_SIZE,
        seats: int = 1,
    ) -> None:
        self.config, self.kind, self.device = config, kind, device
        self.num_pages, self.page_size, self.seats = num_pages, page_size, seats
        self._step_pages: KVLayer | None = None
        try:
            self.layers = tuple(self._layer() for _ in range(config.num_layers))
        except RuntimeError as error:  # torch has one class for every failed allocation
            tokens = num_pages * page_size * bytes_per_token(config, kind)
            size = (tokens + seats * seat_bytes(config, kind)) / 1e9
            raise CapacityError(
                f"A cache of {num_pages * page_size} tokens needs {size:.1f} GB, which this "
                "machine does not have free: lower max_context or max_tokens, or choose a "
                "smaller kv_dtype."
            ) from error

    def grown(self, num_pages: int) -> KVStore:
        """A store of `num_pages` whose first pages are those of this one."""
        settings = (self.device, self.page_size, self.seats)
        store = KVStore(self.config, self.kind, num_pages, *settings)
        for old, new in zip(self.layers, store.layers, strict=True):
            for source, target in zip(_tensors(old), _tensors(new), strict=True):
                target[: len(source)] = source
        return store

    def opened(self, batch: Batch, spans: Sequence[tuple[int, int]], seats: Sequence[int]) -> Batch:
        """The batch with what a cache with open pages needs: see `open_step` for the arguments."""
        if self.kind not in KV_OPEN:
            return batch
        step = open_step(spans, seats, self.page_size, self.device)
        if any(end - begin > 1 for begin, end in spans):
            step = replace(step, pages=self._pages_of_step(step.batch.sequences))
        return replace(batch, open_step=step)

    def _pages_of_step(self, count: int) -> KVLayer:
        """Pages of 16 bits that all layers use in turn; kept, for the next step wants them too."""
        held = self._step_pages
        if held is None or len(held.keys) < count:
            self._step_pages = held = self._pages("float16", max(count, _LEAST_PAGES))
        return held

    def _layer(self) -> KVLayer:
        layer = self._pages(self.kind, self.num_pages)
        if self.kind not in KV_OPEN:
            return layer
        return replace(layer, seats=self._pages("float16", self.seats))

    def _pages(self, kind: str, count: int) -> KVLayer:
        config = self.config
        slots = torch.Size((count, config.num_kv_heads, self.page_size))
        width = stored_width(kind, config.head_dim)
        scales = scales_shape(kind, slots, config.head_dim)

        def codes() -> torch.Tensor:
            return torch.empty(*slots, width, dtype=KV_DTYPES[kind], device=self.device)

        def steps() -> torch.Tensor | None:
            if scales is None:
                return None
            return torch.empty(scales, dtype=torch.float16, device=self.device)

        return KVLayer(kind, codes(), codes(), steps(), steps())


def one_sequence(start: int, tokens: int, page_size: int, device: torch.device) -> Batch:
    """The batch of one sequence that owns pages 0, 1, 2 ...: `tokens` from position `start`."""
    length = start + tokens

    def integers(*bounds: int) -> torch.Tensor:
        return torch.arange(*bounds, dtype=torch.int32, device=device)

    return Batch(
        slots=integers(start, length),
        pages=integers(-(-length // page_size)).unsqueeze(0),
        starts=integers(0, tokens + 1, tokens),
        lengths=integers(length, length + 1),
        max_query=tokens,
        max_length=length,
    )


def open_step(
    spans: Sequence[tuple[int, int]], seats: Sequence[int], page_size: int, device: torch.device
) -> OpenStep:
    """Where the new tokens, positions begin to end of each sequence, stand in pages of 16 bits.

    Single tokens go to the seats themselves. If a sequence has more, all get pages of the step,
    numbered from 0, and whoever calls says in which KVLayer (`pages`).
    """
    decoding = all(end - begin == 1 for begin, end in spans)
    slots: list[int] = []
    pages: list[int] = []
    starts, lengths = [0], []
    loads: list[tuple[int, int]] = []
    keeps: list[tuple[int, int]] = []
    for (begin, end), seat in zip(spans, seats, strict=True):
        if begin % page_size and not decoding:
            loads.append((seat, len(pages)))
        while begin < end:
            stop = min(end, (begin // page_size + 1) * page_size)
            page = seat if decoding else len(pages)
            first = page * page_size + begin % page_size
            slots += range(first, first + stop - begin)
            pages.append(page)
            starts.append(starts[-1] + stop - begin)
            lengths.append((stop - 1) % page_size + 1)
            begin = stop
        if end % page_size and not decoding:
            keeps.append((len(pages) - 1, seat))

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def pairs(values: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor] | None:
        first, second = torch.tensor(values or [(0, 0)], device=device).unbind(1)
        return (first, second) if values else None

    batch = Batch(
        slots=integers(slots),
        pages=integers(pages).unsqueeze(1),
        starts=integers(starts),
        lengths=integers(lengths),
        max_query=max(b - a for a, b in pairwise(starts)),
        max_length=max(lengths),
    )
    return OpenStep(batch, loads=pairs(loads), keeps=pairs(keeps))


def _tensors(layer: KVLayer) -> list[torch.Tensor]:
    found = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    seats = [] if layer.seats is None else _tensors(layer.seats)
    return [tensor for tensor in found if tensor is not None] + seats
