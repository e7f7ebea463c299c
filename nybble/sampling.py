"""How the next token is chosen: validated once, at construction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request.

    temperature, up to 100: 0 is greedy. top_k 0, top_p 1 and min_p 0 switch those filters off.
    Penalties follow the usual definitions: repetition (Keskar et al. 2019, over prompt and output;
    0.01 to 100, 1 is off), presence and frequency (OpenAI, over the output; -2 to 2, 0 is off).
    stop: at most 16 texts. `logprobs` asks for that many alternatives a token (0: only the chosen
    one's), prompt_logprobs the same for the tokens of the prompt. logit_bias: what to add to the
    logits of some token ids, -100 to 100. max_tokens None means: as far as the context goes; 0
    only reads the prompt, for its prompt_logprobs.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _several("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        ids = _several("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)
        for name, low, high in _RANGES:
            _check_range(name, getattr(self, name), low, high)
        if not all(isinstance(text, str) and text for text in stop):
            raise RequestError("stop must be text or a list of non-empty texts.", "stop")
        if len(stop) > _MOST_STOPS:
            raise RequestError(f"stop has {len(stop)} texts: give at most {_MOST_STOPS}.", "stop")
        for token in ids:
            _check_int("stop_token_ids", token, 0)
        _check_int("top_k", self.top_k, 0)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(
                f"ignore_eos is {self.ignore_eos!r}: give true or false.", "ignore_eos"
            )
        self._check_bias()
        least_tokens = 1 if self.prompt_logprobs is None else 0
        for name, least in (("max_tokens", least_tokens), *_COUNTS):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), least)

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, (Mapping, type(None))):
            raise RequestError("logit_bias must map token ids to numbers.", "logit_bias")
        for token, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token, 0)
            _check_range("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return tuple(self.stop)


# Logits times or divided by these stay finite.
_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_MOST_STOPS = 16  # each one is looked for in every piece of text
_COUNTS = (("logprobs", 0), ("prompt_logprobs", 0), ("seed", 0))


def _check_range(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} is {value!r}: give a number from {low:g} to {high:g}.", name)


def _check_int(name: str, value: object, least: int) -> None:
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or not least <= value < 2**63:  # type: ignore[operator]
        need = "below 2^63" if number and value > least else f"of at least {least}"  # type: ignore[operator]
        raise RequestError(f"{name} is {value!r}: give a whole number {need}.", name)


def _several(name: str, values: object) -> tuple[Any, ...]:
    """What a list of settings holds; None: nothing."""
    if values is None:
        return ()
    if isinstance(values, str) or not isinstance(values, Collection):
        raise RequestError(f"{name} is {values!r}: give a list.", name)
    return tuple(values)
