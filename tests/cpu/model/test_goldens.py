"""Parity with the original first-generation code, whose outputs stand in tests/data."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from nybble.sampling import SamplingParams

MODELS = ("qwen1-plain", "qwen1-ntk-logn")
CHUNKS = (512, 7, 1)


@pytest.fixture(params=MODELS)
def folder(request, data):
    return data / request.param


@pytest.fixture
def expected(folder):
    return load_file(folder / "expected.safetensors")


def cases(expected, kind):
    names = {name.split(".")[0] for name in expected if name.startswith(kind)}
    assert names
    return sorted(names)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_logits_of_whole_prompts(make_engine, folder, expected, chunk):
    engine = make_engine(folder, prefill_chunk=chunk)
    for case in cases(expected, "case"):
        logits = engine.logits(expected[f"{case}.input_ids"].tolist())
        torch.testing.assert_close(logits, expected[f"{case}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_greedy_ids_and_their_logprobs(make_engine, folder, expected, chunk):
    engine = make_engine(folder, prefill_chunk=chunk)
    for case in cases(expected, "decode"):
        greedy = expected[f"{case}.greedy_ids"].tolist()
        params = SamplingParams(temperature=0, max_tokens=len(greedy), logprobs=0)
        generation = engine.generate(expected[f"{case}.input_ids"].tolist(), params)
        assert list(generation) == greedy
        logprobs = torch.log_softmax(expected[f"{case}.logits"], -1)
        for row, token in enumerate(generation.logprobs):
            assert token.logprob == pytest.approx(float(logprobs[row, token.token_id]), abs=1e-4)


def test_alpha_stays_that_of_the_prompt(make_engine, data):
    """Decoding past the trained length must not stretch the base, as re-reading would."""
    folder = data / "qwen1-ntk-logn"
    engine = make_engine(folder)
    prompt = list(range(30))
    decoded = list(engine.generate(prompt, SamplingParams(temperature=0, max_tokens=6)))
    as_prompt = engine.logits(prompt + decoded)
    assert engine.decoder.config.trained_context == 32
    generation = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=6, logprobs=0))
    list(generation)
    reread = torch.log_softmax(as_prompt[34], -1)[decoded[5]]
    assert generation.logprobs[5].logprob != pytest.approx(float(reread), abs=1e-4)
