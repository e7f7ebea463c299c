"""What rounding keys and values does to the predictions of the demo's 16-bit original."""

from __future__ import annotations

import pytest
import torch

from nybble import LLM

TEXT = (
    "The river rises in the hills, where rain falls for most of the year, and runs south for "
    "two hundred miles before it meets the sea. Along its banks people have built mills, "
    "bridges and towns, and the names of many of them still tell what was made there: wool, "
    "paper, iron. In 1842 a flood carried away the old bridge, and the new one, of stone, took "
    "seven years to build. Today boats bring visitors from the coast in summer, and in winter "
    "the water is left to the birds. "
)


def predictions(kind: str) -> torch.Tensor:
    """Log-probabilities after each token. No other rounding stands in the way of the cache's."""
    llm = LLM("demo-base", kv_dtype=kind)
    assert llm.tokenizer is not None
    return torch.log_softmax(llm.logits(llm.tokenizer.encode(TEXT * 2)), -1)


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    return predictions("float32")


@pytest.mark.parametrize(
    ("kind", "most"), [("float16", 1e-5), ("int8", 1e-3), ("int6", 1e-2), ("int4", 0.02)]
)
def test_a_rounded_cache_changes_little(exact, kind, most):
    rounded = predictions(kind)
    divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    assert 0 < divergence < most
