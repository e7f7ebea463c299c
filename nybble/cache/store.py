"""Where keys and values are kept between steps."""

from __future__ import annotations

import torch

from nybble.errors import CapacityError

_LEAST_CAPACITY = 512


class KVCache:
    """Keys and values of one sequence: per layer two (kv_heads, capacity, head_dim) tensors.

    `length` counts the valid tokens. The owner of a KVCache is the engine's sequence.
    """

    def __init__(
        self,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._shape = (num_layers, kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self.capacity = self.length = 0
        self.keys, self.values = self._allocate(0), self._allocate(0)

    def reserve(self, tokens: int, limit: int) -> None:
        """Make room for `tokens` in all. Grows by doubling up to `limit`, keeping what is valid."""
        if tokens <= self.capacity:
            return
        capacity = min(limit, max(tokens, 2 * self.capacity, _LEAST_CAPACITY))
        self.keys = self._moved(self.keys, capacity)
        self.values = self._moved(self.values, capacity)
        self.capacity = capacity

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        self.length = length

    def _moved(self, old: tuple[torch.Tensor, ...], capacity: int) -> tuple[torch.Tensor, ...]:
        new = self._allocate(capacity)
        for source, target in zip(old, new, strict=True):
            target[:, : self.length] = source[:, : self.length]
        return new

    def _allocate(self, capacity: int) -> tuple[torch.Tensor, ...]:
        layers, heads, dim = self._shape
        shape = (layers, heads, capacity, dim)
        try:
            return torch.empty(shape, dtype=self._dtype, device=self._device).unbind()
        except RuntimeError as error:  # torch has one class for every failed allocation
            size = 2 * torch.Size(shape).numel() * self._dtype.itemsize / 1e9
            raise CapacityError(
                f"A cache of {capacity} tokens needs {size:.1f} GB, which this machine does not "
                "have free: lower max_context or max_tokens, or choose a smaller kv_dtype."
            ) from error
