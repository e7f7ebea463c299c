"""config.json read strictly: what is not implemented is refused by name."""

from __future__ import annotations

import json

import pytest

from nybble.config import EngineConfig, parse_model_config
from nybble.errors import ConfigError
from nybble.model import read_model_config

QWEN_72B = {
    "model_type": "qwen",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "kv_channels": 128,
    "intermediate_size": 49152,
    "vocab_size": 152064,
    "seq_length": 32768,
    "max_position_embeddings": 32768,
    "rotary_emb_base": 1000000,
    "rotary_pct": 1.0,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "quantization_config": {
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.01,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
    },
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
}


def test_the_72b():
    config = parse_model_config(QWEN_72B)
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size) == (64, 128, 24576)
    assert config.qkv_bias
    assert not config.dynamic_ntk
    assert config.max_context == 32768
    assert (config.q_size, config.kv_size) == (8192, 8192)
    assert config.quant is not None
    assert (config.quant.bits, config.quant.group_size, config.quant.sym) == (4, 128, True)


@pytest.mark.parametrize(("trained", "context"), [(8192, 32768), (2048, 8192)])
def test_dynamic_ntk_advertises_four_times_the_trained_length(trained, context):
    small = {**QWEN_72B, "use_dynamic_ntk": True, "seq_length": trained}
    small["max_position_embeddings"] = trained
    assert parse_model_config(small).max_context == context


def test_qwen2_with_its_sliding_window_off():
    config = parse_model_config(QWEN2)
    assert (config.q_size, config.kv_size, config.qk_norm) == (64, 32, False)


def test_yarn_as_qwen25_files_spell_it():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_model_config({**QWEN2, "rope_scaling": scaling})
    assert config.max_context == 131072
    assert config.rope.attention_factor == pytest.approx(1.138629, abs=1e-6)


REFUSED = {
    "use_sliding_window": True,
    "hidden_act": "gelu",
    "num_experts": 8,
    "model_type": "mamba",
    "hidden_size": "64",
    "num_attention_heads": True,
    "rms_norm_eps": float("nan"),
    "num_key_value_heads": 3,
    "vocab_size": -1,
    "layer_types": ["sliding_attention"],
    "tie_word_embeddings": "yes",
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "quantization_config": {"quant_method": "awq", "bits": 4},
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_name(key):
    with pytest.raises(ConfigError, match=key if key != "quantization_config" else "quant_method"):
        parse_model_config({**QWEN2, key: REFUSED[key]})


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
NO_NUMBERS = [
    ("layer_types", {"layer_types": True}),
    ("layer_types", {"layer_types": 5}),
    ("rope_theta", {"rope_theta": 10**400}),
    ("rms_norm_eps", {"rms_norm_eps": 1e300}),
    ("max_position_embeddings", {"max_position_embeddings": 10**18}),
    ("rotary base", {"rope_theta": 1.0, "rope_scaling": YARN}),
    ("factor", {"rope_scaling": {**YARN, "factor": 10**400}}),
    ("beta_slow", {"rope_scaling": {**YARN, "beta_slow": 1e308}}),
    ("context", {"rope_scaling": {**YARN, "factor": 1e20}}),
    (
        "partial_rotary_factor",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
]


@pytest.mark.parametrize(("name", "changes"), NO_NUMBERS)
def test_values_that_cannot_be_meant_are_refused_in_a_sentence(name, changes):
    with pytest.raises(ConfigError, match=name):
        parse_model_config({**QWEN2, **changes})


def test_mrope_is_refused():
    scaling = {"type": "default", "mrope_section": [16, 24, 24]}
    with pytest.raises(ConfigError, match="rope_scaling"):
        parse_model_config({**QWEN2, "rope_scaling": scaling})


@pytest.mark.parametrize(
    ("key", "value"),
    [("no_bias", False), ("rotary_pct", 0.25), ("intermediate_size", 13), ("seq_length", None)],
)
def test_first_generation_refusals(key, value):
    with pytest.raises(ConfigError, match=key):
        parse_model_config({**QWEN_72B, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 3),
        ("group_size", 0),
        ("group_size", 33),
        ("lm_head", True),
        ("dynamic", {"-:x": {}}),
        ("checkpoint_format", "marlin"),
    ],
)
def test_quantisation_refusals(key, value):
    quant = {**QWEN_72B["quantization_config"], key: value}
    with pytest.raises(ConfigError, match=key):
        parse_model_config({**QWEN_72B, "quantization_config": quant})


def test_the_message_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, "hidden_act": "relu"}))
    with pytest.raises(ConfigError, match=r"config\.json: hidden_act is 'relu'"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int3"},
        {"max_context": 0},
        {"max_context": 10**18},
        {"threads": -1},
        {"kv_dtype": "fp8"},
        {"max_running": 0},
    ],
)
def test_engine_settings_are_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EngineConfig(**options)
