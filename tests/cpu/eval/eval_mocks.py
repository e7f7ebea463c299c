"""Answerers without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from nybble.eval.task import Prompt


class Mock:
    """Answers each prompt by a function of its text; keeps what it was asked."""

    context: int | None = None

    def __init__(self, reply: Callable[[str], str] = lambda text: text) -> None:
        self._reply = reply
        self.prompts: list[Prompt] = []
        self.seeds: list[int] = []

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        self.prompts += prompts
        self.seeds += seeds
        return [self._reply(prompt.text) for prompt in prompts]

    def option_logprobs(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Likes the option that the reply names."""
        wanted = self._reply(prompt)
        return [0.0 if option.strip() == wanted else -math.inf for option in options]

    def tokens(self, text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)


def searcher(text: str) -> str:
    """Retrieves: the sentence of its prompt that shares most words with the question."""
    context, _, question = text.rpartition("\n\nAnswer the question")
    wanted = set(re.findall(r"\w+", question.rpartition("Question:")[2].lower()))
    sentences = re.split(r"(?<=[.!?])\s+", context)
    return max(sentences, key=lambda s: len(wanted & set(re.findall(r"\w+", s.lower()))))


def forgetful(keep: int) -> Callable[[str], str]:
    """Retrieves from the last `keep` characters of the context only."""
    return lambda text: searcher(text[-keep:])
