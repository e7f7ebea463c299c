"""What a model is and how it is to be run: frozen dataclasses and the strict reader of config.json.

Foreign JSON is read once, here, through typed accessors. A value that nybble does not implement
is refused by name, before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from nybble.errors import ConfigError

_REQUIRED: Final = object()
_MOST = 2**31 - 1  # tokens, rows, dimensions: kernels count in int32
_LARGEST = 1e30  # far from where float32 ends


class JsonReader:
    """Typed access to one JSON object; every complaint names the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def fail(self, key: str, need: str) -> ConfigError:
        found = f"is {self.data[key]!r}" if key in self.data else "is missing"
        return ConfigError(f"{self.where}: {key} {found}; {need}.")

    def _get(self, key: str, default: Any, kind: str, fits: Callable[[Any], bool]) -> Any:
        value = self.data.get(key)
        if value is None and default is not _REQUIRED:
            return default
        if not fits(value):
            raise self.fail(key, f"it must be {kind}")
        return value

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        def fits(value: Any) -> bool:
            number = isinstance(value, int) and not isinstance(value, bool)
            return number and least <= value <= _MOST

        return int(self._get(key, default, f"a whole number from {least} to {_MOST}", fits))

    def optional_integer(self, key: str, least: int = 1) -> int | None:
        return self.integer(key, least=least) if key in self else None

    def number(self, key: str, default: Any = _REQUIRED, least: float = 1e-30) -> float:
        def fits(value: Any) -> bool:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return number and least <= value <= _LARGEST

        return float(self._get(key, default, f"a number from {least:g} to {_LARGEST:g}", fits))

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        return bool(self._get(key, default, "true or false", lambda v: isinstance(v, bool)))

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        return str(self._get(key, default, "a text", lambda v: isinstance(v, str)))

    def section(self, key: str) -> JsonReader | None:
        value = self._get(key, None, "an object", lambda v: isinstance(v, dict))
        return None if value is None else JsonReader(value, f"{self.where}, {key}")

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse any value of `key` but `allowed`; a missing or null key is fine."""
        if self.data.get(key) is not None and self.data[key] not in allowed:
            names = " or ".join(repr(value) for value in allowed)
            raise self.fail(key, f"nybble implements only {names}: use another checkpoint")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `kind`: default, linear, yarn (Peng et al. 2023) or llama3."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class QuantConfig:
    """The `quantization_config` of a GPTQ checkpoint. group_size -1: one group a column."""

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    checkpoint_format: str = "gptq"


@dataclass(frozen=True)
class ModelConfig:
    """One decoder for all families: what differs between them is a flag here.

    intermediate_size is the width of ONE MLP matrix; max_context what the model advertises;
    trained_context what dynamic NTK and LogN compare against.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope: RopeConfig
    max_context: int
    trained_context: int
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dynamic_ntk: bool = False
    logn: bool = False
    eos_token_ids: tuple[int, ...] = ()
    quant: QuantConfig | None = None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model on this machine. `auto` is settled when the model is loaded.

    dtype float32 computes every product in fp32 (exact, slow); auto takes the fastest kernels.
    max_running requests share a step of prefill_chunk tokens, and a cache of cache_tokens.
    None leaves both to the model and the device.
    """

    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_context: int | None = None
    prefill_chunk: int | None = None
    threads: int | None = None
    max_running: int = 64
    cache_tokens: int | None = None
    fill_memory: bool = False

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_dtype", self.kv_dtype, ("auto", *KV_BITS))
        for name in ("max_context", "prefill_chunk", "threads", "max_running", "cache_tokens"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 1 <= value <= _MOST):
                raise ConfigError(f"{name} is {value!r}: give a whole number from 1 to {_MOST}.")


DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_GROUP = 64  # dimensions of a head that share a step in an int4 cache
# The kinds of a cache, and what a number takes in each, without scales.
# KV_OPEN: those that also hold the page which a sequence is filling in 16 bits.
KV_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int6": 6, "int4": 4}
KV_OPEN = frozenset({"int4"})


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}: choose one of {', '.join(allowed)}.")


def parse_model_config(data: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig from the content of a config.json."""
    reader = JsonReader(data, where)
    family = reader.text("model_type")
    if family not in _FAMILIES:
        raise reader.fail("model_type", f"nybble runs {', '.join(_FAMILIES)}")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        reader.require(key, 0)
    config = _FAMILIES[family](reader)
    if config.num_heads % config.num_kv_heads:
        raise reader.fail("num_key_value_heads", "it must divide num_attention_heads")
    if config.head_dim % 2:
        raise reader.fail("head_dim", "rotary embedding needs an even head dimension")
    if config.rope.theta <= 1:
        raise ConfigError(f"{where}: the rotary base is {config.rope.theta}; it must be above 1.")
    if config.max_context > _MOST:
        raise ConfigError(
            f"{where}: the context comes to {config.max_context:g} tokens, with what stretches it; "
            f"it must be at most {_MOST}."
        )
    return config


def _read_qwen(reader: JsonReader) -> ModelConfig:
    reader.require("no_bias", True)
    reader.require("rotary_pct", 1.0)
    reader.require("tie_word_embeddings", False)
    reader.require("scale_attn_weights", True)
    heads = reader.integer("num_attention_heads")
    trained = reader.integer("seq_length")
    dynamic_ntk = reader.boolean("use_dynamic_ntk", False)
    # The releases advertise four times the trained length where dynamic NTK stretches it.
    stretched = trained * 4 if dynamic_ntk else trained
    width = reader.integer("intermediate_size", least=2)
    if width % 2:
        raise reader.fail("intermediate_size", "it must be twice the width of one MLP matrix")
    hidden = reader.integer("hidden_size")
    return ModelConfig(
        family="qwen",
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=reader.integer("kv_channels", hidden // heads),
        intermediate_size=width // 2,
        vocab_size=reader.integer("vocab_size"),
        norm_eps=reader.number("layer_norm_epsilon", 1e-6),
        rope=RopeConfig(reader.number("rotary_emb_base", 10000.0)),
        max_context=max(stretched, reader.integer("max_position_embeddings", trained)),
        trained_context=trained,
        qkv_bias=True,
        dynamic_ntk=dynamic_ntk,
        logn=reader.boolean("use_logn_attn", False),
        quant=_read_quant(reader),
    )


def _read_successor(reader: JsonReader, *, qkv_bias: bool, qk_norm: bool) -> ModelConfig:
    """Qwen2, Qwen3 and Llama share their keys."""
    reader.require("hidden_act", "silu")
    reader.require("use_sliding_window", False)
    reader.require("mlp_bias", False)
    reader.require("use_mrope", False)
    reader.require("partial_rotary_factor", 1.0)
    if not qkv_bias:
        reader.require("attention_bias", False)
    layer_types = reader.data.get("layer_types")
    full = isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    if layer_types is not None and not full:
        raise reader.fail("layer_types", "nybble implements only full attention in every layer")
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    context = reader.integer("max_position_embeddings")
    rope = _read_rope(reader, context)
    return ModelConfig(
        family=reader.text("model_type"),
        hidden_size=hidden,
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads),
        head_dim=reader.integer("head_dim", hidden // heads),
        intermediate_size=reader.integer("intermediate_size"),
        vocab_size=reader.integer("vocab_size"),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_context=_stretched_context(rope, context),
        trained_context=rope.original_context or context,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied=reader.boolean("tie_word_embeddings", False),
        eos_token_ids=token_ids(reader, "eos_token_id"),
        quant=_read_quant(reader),
    )


_FAMILIES: Mapping[str, Callable[[JsonReader], ModelConfig]] = {
    "qwen": _read_qwen,
    "qwen2": lambda reader: _read_successor(reader, qkv_bias=True, qk_norm=False),
    "qwen3": lambda reader: _read_successor(reader, qkv_bias=False, qk_norm=True),
    "llama": lambda reader: _read_successor(reader, qkv_bias=False, qk_norm=False),
}


def _read_rope(reader: JsonReader, context: int) -> RopeConfig:
    """`rope_theta` and `rope_scaling`, or `rope_parameters` as Transformers 5 writes them."""
    section = reader.section("rope_parameters") or reader.section("rope_scaling")
    if section is None:
        return RopeConfig(reader.number("rope_theta", 10000.0))
    theta = section.number("rope_theta", reader.number("rope_theta", 10000.0))
    key = "rope_type" if "rope_type" in section else "type"
    kind = section.text(key, "default")
    if "mrope_section" in section or kind not in ("default", "linear", "yarn", "llama3"):
        raise section.fail(key, "nybble implements default, linear, yarn and llama3")
    section.require("partial_rotary_factor", 1.0)
    if kind == "default":
        return RopeConfig(theta)
    for name in ("mscale", "mscale_all_dim"):
        section.require(name)
    section.require("truncate", True)
    factor = section.number("factor")
    # Transformers' rule: 0.1 ln(factor) + 1, unless the file gives a value.
    yarn_attention = 0.1 * math.log(factor) + 1.0 if kind == "yarn" and factor > 1 else 1.0
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_context=section.integer("original_max_position_embeddings", context),
        attention_factor=section.number("attention_factor", yarn_attention),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        low_freq_factor=section.number("low_freq_factor", 1.0),
        high_freq_factor=section.number("high_freq_factor", 4.0),
    )


def _stretched_context(rope: RopeConfig, context: int) -> int:
    """YaRN files of Qwen2.5 keep the unstretched length in max_position_embeddings."""
    if rope.kind in ("yarn", "linear"):
        return max(context, int(rope.original_context * rope.factor))
    return context


def _read_quant(reader: JsonReader) -> QuantConfig | None:
    section = reader.section("quantization_config")
    if section is None:
        return None
    section.require("quant_method", "gptq")
    section.require("lm_head", False)
    section.require("dynamic", {})
    bits = section.integer("bits")
    if bits not in (4, 8):
        raise section.fail("bits", "nybble reads 4 and 8 bits")
    group_size = section.integer("group_size", -1, least=-1)
    if group_size == 0 or (group_size > 0 and group_size % 8):
        raise section.fail("group_size", "it must be -1 or a multiple of 8")
    label = section.text("checkpoint_format", "gptq")
    if label not in ("gptq", "gptq_v2"):
        raise section.fail("checkpoint_format", "nybble reads gptq and gptq_v2")
    return QuantConfig(
        bits=bits,
        group_size=group_size,
        desc_act=section.boolean("desc_act", False),
        sym=section.boolean("sym", True),
        checkpoint_format=label,
    )


def token_ids(reader: JsonReader, key: str) -> tuple[int, ...]:
    """A token id or a list of them."""
    value = reader.data.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise reader.fail(key, "it must be a token id or a list of token ids")
    return tuple(ids)
