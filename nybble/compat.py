"""The two classes of the model card's Quickstart, so that its lines run with another import.

`AutoTokenizer` and `AutoModelForCausalLM` take what people pass to Transformers' classes of these
names and answer as the first Qwen generation's own code did. No code of a checkpoint is ever
run, whatever trust_remote_code says. An argument that would change the results is either
followed or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nybble.errors import RequestError
from nybble.llm import LLM
from nybble.outputs import TextStream
from nybble.resolve import resolve
from nybble.sampling import SamplingParams
from nybble.tokenizer import DEFAULT_SYSTEM, Tokenizer, load_tokenizer

Turn = tuple[str, str]

# What people pass that changes neither the results nor what is run here.
_WITHOUT_EFFECT = frozenset(
    {
        "trust_remote_code",
        "resume_download",
        "low_cpu_mem_usage",
        "use_fast",
        "use_flash_attn",
        "attn_implementation",
    }
)
_FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_FOR_THE_HUB = {
    "cache_dir": "set the environment variable HF_HOME",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "token": "run `hf auth login`",
    "mirror": "set the environment variable HF_ENDPOINT",
}


class AutoTokenizer:
    """Loads the tokenizer of a model."""

    @staticmethod
    def from_pretrained(
        path: str | Path, *, revision: str | None = None, **options: Any
    ) -> Tokenizer:
        """The tokenizer of a folder, of "demo" or of a hub repository.

        trust_remote_code is accepted, and no remote code is run. RequestError names an option
        that means nothing here.
        """
        _refuse_rest(options)
        return load_tokenizer(resolve(path, revision=revision))


class AutoModelForCausalLM:
    """Loads a model."""

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        device_map: object = None,
        revision: str | None = None,
        torch_dtype: object = None,
        dtype: object = None,
        **options: Any,
    ) -> ChatModel:
        """The model of a folder, of "demo" or of a hub repository.

        device_map: "auto", "cpu" or another device, also as {"": device}. torch_dtype (dtype),
        bf16=True, fp16=True, fp32=True: the dtype of unquantised matrices; float32 computes
        everything exactly. trust_remote_code is accepted, and no remote code is run.
        RequestError names an option that means nothing here.
        """
        flags = {name: options.pop(name) for name in _FLAGS if name in options}
        _refuse_rest(options)
        device, wanted = _device(device_map), _dtype(torch_dtype, dtype, flags)
        return ChatModel(LLM(resolve(path, revision=revision), device=device, dtype=wanted))


@dataclass
class GenerationConfig:
    """How answers are sampled, under Transformers' names; change the fields as you like."""

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def from_params(cls, params: SamplingParams) -> GenerationConfig:
        return cls(
            do_sample=not params.greedy,
            temperature=params.temperature or 1.0,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            max_new_tokens=params.max_tokens,
        )

    def params(self) -> SamplingParams:
        """The same as SamplingParams; RequestError for a value out of range."""
        return SamplingParams(
            temperature=self.temperature if self.do_sample else 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=self.max_new_tokens,
        )


class ChatModel:
    """A loaded model with the methods of the first Qwen generation's own class."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._generation_config = GenerationConfig.from_params(llm.default_params)

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of every answer, at first those of generation_config.json."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self._generation_config = _checked_config(value)

    def eval(self) -> ChatModel:
        """Nothing to do: a model here only ever answers."""
        return self

    def chat(
        self,
        tokenizer: Tokenizer,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str = DEFAULT_SYSTEM,
        **sampling: Any,
    ) -> tuple[str, list[Turn]]:
        """Answer `query`; returns the answer and a new history that ends in this turn.

        sampling: generation_config, its fields, or those of SamplingParams, for this call.
        """
        stream = self._stream(tokenizer, query, history, system, sampling)
        response = "".join(stream).strip()
        return response, [*(history or ()), (query, response)]

    def chat_stream(
        self,
        tokenizer: Tokenizer,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str = DEFAULT_SYSTEM,
        **sampling: Any,
    ) -> Iterator[str]:
        """`chat` that yields the whole answer so far, again and again, as it grows."""
        stream = self._stream(tokenizer, query, history, system, sampling)
        return _growing(stream)

    def _stream(
        self,
        tokenizer: Tokenizer,
        query: str,
        history: Sequence[Turn] | None,
        system: str,
        sampling: Mapping[str, Any],
    ) -> TextStream:
        self._check_tokenizer(tokenizer)
        params = self._params(dict(sampling), tokenizer)
        return self.llm.stream(query, history=history, system=system, sampling_params=params)

    def _check_tokenizer(self, tokenizer: object) -> None:
        own = self.llm.tokenizer
        same = isinstance(tokenizer, Tokenizer) and own is not None
        if not same or _vocabulary(tokenizer) != _vocabulary(own):
            raise RequestError(
                "The tokenizer is not this model's: pass what nybble's AutoTokenizer loads from "
                "the same path."
            )

    def _params(self, sampling: dict[str, Any], tokenizer: Tokenizer) -> SamplingParams:
        """The defaults, with what one call gives in their place, in either spelling."""
        config = _checked_config(sampling.pop("generation_config", self.generation_config))
        stop_words = sampling.pop("stop_words_ids", ())
        unknown = sampling.keys() - _OURS - _THEIRS
        if unknown:
            raise _refused(min(unknown), f"use {', '.join(sorted(_OURS | _THEIRS))}")
        if sampling.keys() & {"temperature", "top_p", "top_k", "min_p"}:
            sampling.setdefault("do_sample", True)  # or they would be ignored
        config = replace(config, **_chosen(sampling, _THEIRS))
        params = replace(config.params(), **_chosen(sampling, _OURS - _THEIRS))
        return _with_stop_words(params, stop_words or (), tokenizer)


# The answers of this class are texts, so nobody would see log probabilities.
_OURS = frozenset(field.name for field in fields(SamplingParams)) - {"logprobs", "prompt_logprobs"}
_THEIRS = frozenset(field.name for field in fields(GenerationConfig))


def _chosen(values: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _with_stop_words(
    params: SamplingParams, stop_words: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> SamplingParams:
    """stop_words_ids: each is one token, or the ids of a text. The answer ends before it."""
    tokens = [word[0] for word in stop_words if len(word) == 1]
    texts = [tokenizer.decode(word) for word in stop_words if len(word) > 1]
    return replace(
        params,
        stop_token_ids=[*params.stop_token_ids, *tokens],
        stop=[*params.stop_texts, *texts],
    )


def _vocabulary(tokenizer: Any) -> tuple[int, Mapping[str, int]]:
    return tokenizer.vocab_size, tokenizer.special_tokens


def _growing(stream: TextStream) -> Iterator[str]:
    text = ""
    for piece in stream:
        text += piece
        yield text


def _checked_config(value: object) -> GenerationConfig:
    if not isinstance(value, GenerationConfig):
        raise RequestError(
            f"generation_config is a {type(value).__name__}: change the fields of "
            "model.generation_config instead, temperature for example."
        )
    return value


# -- options of from_pretrained -----------------------------------------------------------------


def _refuse_rest(options: Mapping[str, object]) -> None:
    for name in options:
        if name not in _WITHOUT_EFFECT:
            raise _refused(name, _FOR_THE_HUB.get(name, "leave it out"))


def _refused(name: str, advice: str) -> RequestError:
    return RequestError(f"nybble does not take the argument {name!r} here: {advice}.")


def _device(device_map: object) -> str:
    """One device: nybble keeps a model whole."""
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is None:
        return "auto"
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    if isinstance(device_map, Mapping) or device_map in ("balanced", "sequential"):
        raise RequestError("device_map spreads the model over devices: give auto or one device.")
    return str(device_map)


def _dtype(torch_dtype: object, dtype: object, flags: Mapping[str, object]) -> str:
    """The one dtype that was asked for; "auto" if none was."""
    given = [value for value in (torch_dtype, dtype) if value not in (None, "auto")]
    named = [str(value).removeprefix("torch.") for value in given]
    named += [_FLAGS[name] for name, wanted in flags.items() if wanted]
    if len(set(named)) > 1:
        raise RequestError(f"Two dtypes are asked for, {' and '.join(named)}: give one.")
    return named[0] if named else "auto"
