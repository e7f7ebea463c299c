"""The embedded default, real weights: it answers in sense through the loader of every model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nybble import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=40)
ROOT = Path(__file__).parents[2]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def demo():
    return LLM("demo")


def test_the_capital_of_france(demo):
    answer = demo.chat(QUESTION, sampling_params=GREEDY)
    assert "Paris" in answer.text
    assert answer.finish_reason in ("stop", "length")


def test_it_is_an_ordinary_gptq_folder(demo):
    config = json.loads((demo.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert config["quantization_config"]["bits"] == 4
    assert config["quantization_config"]["group_size"] == 32
    assert {path.suffix for path in demo.folder.iterdir()} <= {".json", ".safetensors", ".md"}


def test_the_16_bit_base(demo):
    base = LLM("demo-base")
    assert base.config.quant is None
    assert "Paris" in base.chat(QUESTION, sampling_params=GREEDY).text


def test_fast_kernels_predict_what_the_exact_ones_do(demo):
    exact = LLM("demo", dtype="float32")
    ids = demo.encode((ROOT / "docs" / "long-context.md").read_text())
    fast_logits, exact_logits = demo.logits(ids), exact.logits(ids)
    fast = torch.log_softmax(fast_logits, -1)
    true = torch.log_softmax(exact_logits, -1)
    divergence = (true.exp() * (true - fast)).sum(-1).mean()
    assert float(divergence) < 0.01


def test_chunks_do_not_change_an_answer(demo):
    """Rows are computed alike however many run together, on the fast kernels too."""
    ids = demo.chat_ids("Tell me about rivers.")
    whole = demo.logits(ids)
    demo.engine.prefill_chunk, chunk = 5, demo.engine.prefill_chunk
    try:
        torch.testing.assert_close(demo.logits(ids), whole, atol=1e-2, rtol=0)
    finally:
        demo.engine.prefill_chunk = chunk


def test_a_conversation_remembers(demo):
    history = [(QUESTION, "The capital of France is Paris.")]
    answer = demo.chat("And of Italy?", history=history, sampling_params=GREEDY)
    assert "Rome" in answer.text
