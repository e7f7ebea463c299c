"""The demo's real weights: what quantising them cost, and what the folder says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble import LLM
from nybble.measure import compare

TEXT = (Path(__file__).parents[1] / "data" / "quantiser" / "heldout.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def comparison():
    base, quant = LLM("demo-base", dtype="float32"), LLM("demo", dtype="float32")
    return compare(base, quant, TEXT, window=512)


def test_four_bits_lose_little(comparison):
    """On text unlike the calibration's."""
    assert comparison.ratio < 1.06
    assert comparison.top1_agreement > 0.8
    assert comparison.quant_bytes < 0.5 * comparison.base_bytes


def test_every_layer_is_reported(comparison):
    assert len(comparison.layer_errors) == 30
    assert all(0 < error < 0.01 for error in comparison.layer_errors)


def test_the_folder_says_how_it_was_made():
    folder = LLM("demo").folder
    card = (folder / "README.md").read_text()
    assert "| bits, group size | 4, 32 (asymmetric) |" in card
    report = json.loads((folder / "quantization_report.json").read_text())
    assert report["settings"]["calibration"]["tokens"] > 5000
