"""A decode step without the host: captured once in a CUDA graph, fed by the tokens it chooses."""

from __future__ import annotations

import torch

from nybble.cache.store import KVStore
from nybble.kernels.backend import Batch
from nybble.model.decoder import Decoder, Step
from nybble.model.rope import Positions


class DecodeGraph:
    """Greedy decoding of `sequences` sequences, one token each a replay.

    positions: the factors of every position up to the context's end. max_length bounds the keys
    while this graph is used: kernels share out their work by it. Whoever samples otherwise than
    greedily reads `logits` and writes `ids` before the next replay.

    Buffers on the device, set by `load`: ids (sequences,), the token to feed next; lengths
    int32 (sequences,), the keys that are cached; pages int32 (sequences, most pages).
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        positions: Positions,
        sequences: int,
        max_length: int,
    ) -> None:
        device = decoder.embed_tokens.device
        pages = -(-max_length // store.page_size)
        self.decoder, self.store, self.positions = decoder, store, positions
        self.max_length = max_length
        self.ids = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.pages = torch.zeros(sequences, pages, dtype=torch.int32, device=device)
        self.starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        self.logits = self._captured()

    def load(self, ids: torch.Tensor, lengths: torch.Tensor, pages: torch.Tensor) -> None:
        """Set which sequences run next: shapes as the buffers, `pages` possibly narrower."""
        self.ids.copy_(ids)
        self.lengths.copy_(lengths)
        self.pages[:, : pages.shape[1]].copy_(pages)

    def replay(self) -> None:
        """Feed `ids`, put the best next ones in their place; returns before it is done."""
        self._graph.replay()

    def _captured(self) -> torch.Tensor:
        """Warm up (kernels compile, libraries allocate), then capture; page 0 takes the writes."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            logits = self._step()
        self.lengths.zero_()
        return logits

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
        )
        logits = self.decoder.forward(
            self.ids, Step(self._positions_at(at), batch, self.store.layers)
        )
        self.ids.copy_(logits.argmax(-1))
        self.lengths.add_(1)
        return logits

    def _positions_at(self, at: torch.Tensor) -> Positions:
        scale = self.positions.query_scale
        return Positions(
            self.positions.cos[at],
            self.positions.sin[at],
            None if scale is None else scale[at],
        )
