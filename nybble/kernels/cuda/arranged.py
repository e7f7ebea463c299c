"""Activations in the order in which the Hopper kernels read them: see arranged.cuh."""

from __future__ import annotations

import torch

from nybble.kernels.cuda.packing import PIECE


def arranged(tokens: int, inputs: int, rows: int, like: torch.Tensor) -> torch.Tensor:
    """Room for activations in the order of arranged.cuh: (inputs / 64, tokens, 64), a view of so
    many rows, uninitialised."""
    out = torch.empty(inputs // PIECE, rows, PIECE, dtype=like.dtype, device=like.device)
    return out[:, :tokens]


def rows_of(x: torch.Tensor) -> int:
    """Of arranged activations: those that there is room for."""
    return x.stride(0) // PIECE
