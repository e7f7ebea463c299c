"""The benchmark of the 72B's block, at toy size: that it runs, not how fast."""

from __future__ import annotations

import sys

from nybble.gptq import bench


def test_the_benchmark_runs(monkeypatch, capsys):
    sizes = ["--hidden", "128", "--intermediate", "192", "--samples", "2", "--length", "64"]
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", *sizes])
    bench.main()
    printed = capsys.readouterr().out
    assert "one layer: " in printed
    assert "80 layers: " in printed
