"""A model for tests of the command line: it repeats what it is told, and needs no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from nybble.errors import CapacityError, RequestError
from nybble.sampling import SamplingParams


@dataclass
class FakeTiming:
    prompt_tokens: int
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.5
    decode_seconds: float = 2.0
    decode_rate: float = 10.0


class FakeStream:
    """One token a character; ends at params.max_tokens or at the end of the text."""

    def __init__(self, ids: list[int], text: str, params: SamplingParams, delay: float) -> None:
        self.timing = FakeTiming(len(ids))
        self.prompt_ids = ids
        self.closed = False
        self._text = text if params.max_tokens is None else text[: params.max_tokens]
        self._cut = self._text != text
        self._delay = delay
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self) -> Iterator[str]:
        for character in self._text:
            time.sleep(self._delay)
            self.timing.new_tokens += 1
            yield character

    def close(self) -> None:
        self.closed = True

    @property
    def completion(self) -> Any:
        return SimpleNamespace(
            decoded=self._text,
            token_ids=[ord(character) for character in self._text],
            prompt_token_ids=self.prompt_ids,
            finish_reason="length" if self._cut else "stop",
            timing=self.timing,
        )


class FakeLLM:
    """A prompt's ids are the code points of its messages as JSON; the answer repeats the last."""

    def __init__(self, max_context: int = 1000, delay: float = 0.0) -> None:
        self.engine = SimpleNamespace(max_context=max_context)
        self.default_params = SamplingParams(temperature=0.5, top_p=0.8)
        self.delay = delay
        self.prompts: list[list[dict[str, str]]] = []
        self.params: list[SamplingParams] = []

    def chat_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [ord(character) for character in json.dumps(messages)]

    def encode(self, prompt: str | list[int]) -> list[int]:
        return [ord(character) for character in prompt] if isinstance(prompt, str) else prompt

    def stream(self, ids: list[int], sampling_params: SamplingParams) -> FakeStream:
        text = "".join(map(chr, ids))
        if len(ids) >= self.engine.max_context:
            raise CapacityError("The prompt is too long: shorten it.")
        if "poison" in text:
            raise RequestError("This text is poison: write another.")
        if text.startswith("["):
            messages = json.loads(text)
            self.prompts.append(messages)
            text = f"You said {messages[-1]['content']}"
        self.params.append(replace(sampling_params))
        return FakeStream(ids, text, sampling_params, self.delay)
