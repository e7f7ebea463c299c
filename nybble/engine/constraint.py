"""What an answer may become, decided token by token: structured output behind a small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from nybble.errors import NybbleError

WORD_BITS = 32


class Constraint(Protocol):
    """The rules of one answer and how far it has come: each request needs its own.

    It follows the tokens that were chosen, so a request that gives its pages back and computes
    them again later leaves it untouched.
    """

    def fill(self, words: torch.Tensor) -> None:
        """Mark what may come next in int32 (ceil(vocab / 32),) on the CPU: token t is bit
        t % 32 of word t // 32. A token that ends the answer is marked where it may end."""

    def accept(self, token: int) -> bool:
        """Go on behind `token`; False, and nothing changed, where it may not come."""


class Contained:
    """A constraint whose faults are its own request's: they come out of `accept` as NybbleError."""

    def __init__(self, inner: Constraint) -> None:
        self._inner = inner
        self._fault: Exception | None = None

    def fill(self, words: torch.Tensor) -> None:
        try:
            self._inner.fill(words)
        except Exception as error:  # noqa: BLE001  of a library, whatever it raises
            self._fault = error
            words.zero_()

    def accept(self, token: int) -> bool:
        try:
            if self._fault is not None:
                raise self._fault
            return self._inner.accept(token)
        except Exception as error:
            raise NybbleError(
                f"The required form of this answer could not be followed ({error}): simplify the "
                "schema, or ask without one."
            ) from error


def allowed_tokens(
    constraints: Sequence[Constraint], vocab_size: int, device: torch.device
) -> torch.Tensor:
    """bool (constraints, vocab): which tokens may come next.

    Where a constraint knows no way on, everything is allowed: whatever is chosen is refused by
    its `accept`, which ends that request and no other.
    """
    words = torch.zeros(len(constraints), -(-vocab_size // WORD_BITS), dtype=torch.int32)
    for row, constraint in zip(words, constraints, strict=True):
        constraint.fill(row)
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=device)
    marked = (words.to(device).unsqueeze(-1) >> bits) & 1  # (constraints, words, 32)
    allowed = marked.flatten(1)[:, :vocab_size].bool()
    return allowed | ~allowed.any(dim=-1, keepdim=True)
