"""Where keys and values are kept between steps: pages of all layers, in one kind."""

from __future__ import annotations

import torch

from nybble.cache.sizes import bytes_per_token
from nybble.config import ModelConfig
from nybble.errors import CapacityError
from nybble.kernels.backend import KV_DTYPES, Batch, KVLayer, scales_shape, stored_width

PAGE_SIZE = 64


class KVStore:
    """The pages of every layer, (num_pages, kv_heads, page_size, head_dim) each.

    Who owns which page is the business of the engine: the store only holds them.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        num_pages: int,
        device: torch.device,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.config, self.kind, self.device = config, kind, device
        self.num_pages, self.page_size = num_pages, page_size
        try:
            self.layers = tuple(self._layer() for _ in range(config.num_layers))
        except RuntimeError as error:  # torch has one class for every failed allocation
            size = num_pages * page_size * bytes_per_token(config, kind) / 1e9
            raise CapacityError(
                f"A cache of {num_pages * page_size} tokens needs {size:.1f} GB, which this "
                "machine does not have free: lower max_context or max_tokens, or choose a "
                "smaller kv_dtype."
            ) from error

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))

    def grown(self, num_pages: int) -> KVStore:
        """A store of `num_pages` whose first pages are those of this one."""
        store = KVStore(self.config, self.kind, num_pages, self.device, self.page_size)
        for old, new in zip(self.layers, store.layers, strict=True):
            for source, target in zip(_tensors(old), _tensors(new), strict=True):
                target[: self.num_pages] = source
        return store

    def _layer(self) -> KVLayer:
        config = self.config
        slots = torch.Size((self.num_pages, config.num_kv_heads, self.page_size))
        width = stored_width(self.kind, config.head_dim)
        scales = scales_shape(self.kind, slots, config.head_dim)

        def codes() -> torch.Tensor:
            return torch.empty(*slots, width, dtype=KV_DTYPES[self.kind], device=self.device)

        def steps() -> torch.Tensor | None:
            if scales is None:
                return None
            return torch.empty(scales, dtype=torch.float16, device=self.device)

        return KVLayer(self.kind, codes(), codes(), steps(), steps())


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


def _tensors(layer: KVLayer) -> list[torch.Tensor]:
    found = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    return [tensor for tensor in found if tensor is not None]
