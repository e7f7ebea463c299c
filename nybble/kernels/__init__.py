"""Tensors to tensors: one contract, several sets of kernels, one truth (`ref`)."""

from nybble.kernels.table import choose_backend, select_backend, self_test

__all__ = ["choose_backend", "select_backend", "self_test"]
