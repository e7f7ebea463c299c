"""Parity with Transformers' Qwen2, Qwen3 and Llama at toy size, random weights, fp32."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nybble.sampling import SamplingParams

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 6}),
    "llama-gqa-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama-linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    ),
}


@pytest.fixture(params=MODELS)
def reference(request, tmp_path):
    """(Transformers' model, the folder it saved)."""
    kind, config_class, extra = MODELS[request.param]
    options = {**SHAPE, **extra}
    if "rope_parameters" in options:
        options["rope_parameters"] = {"rope_theta": 10000.0, **options["rope_parameters"]}
    torch.manual_seed(0)
    model = kind(config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_logits(reference, make_engine):
    model, folder = reference
    ids = torch.randint(0, SHAPE["vocab_size"], (60,), generator=torch.manual_seed(1))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    for chunk in (512, 16, 1):
        logits = make_engine(folder, prefill_chunk=chunk).logits(ids.tolist())
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_greedy_decoding(reference, make_engine):
    model, folder = reference
    prompt = [5, 17, 3, 80]
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    generation = make_engine(folder).generate(prompt, SamplingParams(temperature=0, max_tokens=12))
    assert prompt + list(generation) == expected[0].tolist()


def test_the_older_spelling_of_rope_settings(tmp_path, make_engine):
    """Files from before Transformers 5 have rope_theta and rope_scaling."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    parameters = {**YARN, "rope_theta": 5e5}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=parameters))
    model.eval().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, "rope_theta": 5e5, "rope_scaling": scaling}))
    ids = list(range(50))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(make_engine(tmp_path).logits(ids), expected, atol=1e-4, rtol=1e-5)
