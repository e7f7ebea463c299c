"""The ceiling that the CPU kernels stand beside."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels import bench


def test_the_ceiling_is_the_best_read(monkeypatch):
    """A median can be passed by a kernel that had a better moment."""
    monkeypatch.setattr(torch, "ones", lambda count: torch.zeros(1).expand(count))
    monkeypatch.setattr(bench, "times", lambda run: [2.0, 4.0, 8.0])
    assert bench.read_bandwidth() == pytest.approx(2**29 / 2.0)
    assert bench.seconds(print) == 4.0
