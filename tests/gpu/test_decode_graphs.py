"""Decode graphs through the life of an engine, on an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch
from toy import write_llama

from nybble import LLM, SamplingParams

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

LONG = SamplingParams(temperature=0, max_tokens=1200, ignore_eos=True)


def test_answers_go_on_after_all_graphs_were_dropped(tmp_path):
    """As when a prompt with a rotary base of its own arrives: the pool of the first is gone."""
    llm = LLM(write_llama(tmp_path, head_dim=64, max_position_embeddings=2048), device="cuda")
    first = llm.generate([5, 6, 7], LONG).token_ids
    positions = llm.engine._runner._positions
    for _ in range(3):
        positions._build([1.0], 2 * len(positions.table.cos))
        assert llm.generate([5, 6, 7], LONG).token_ids == first


def test_two_engines_side_by_side(tmp_path):
    """Graphs of one that are dropped take nothing from those of the other."""
    folder = write_llama(tmp_path, head_dim=64, max_position_embeddings=2048)
    one, other = (LLM(folder, device="cuda") for _ in range(2))
    first = one.generate([5, 6, 7], LONG).token_ids
    assert other.generate([5, 6, 7], LONG).token_ids == first
    del one
    torch.cuda.empty_cache()
    assert other.generate([5, 6, 7], LONG).token_ids == first


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_first(tmp_path):
    folder = write_llama(tmp_path, head_dim=64, max_position_embeddings=2048)
    want, got = (
        LLM(folder, device=device).generate([5, 6, 7], LONG).token_ids
        for device in ("cuda:0", "cuda:1")
    )
    assert got == want
