"""From an API request to generations and pieces of text. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nybble.engine.constraint import Constraint
from nybble.engine.loop import AsyncEngine
from nybble.errors import CapacityError, ConfigError, RequestError
from nybble.grammar import GrammarCompiler
from nybble.llm import LLM
from nybble.outputs import no_tokenizer
from nybble.sampling import SamplingParams
from nybble.serve.answers import Answer, Answers
from nybble.serve.errors import refused, unknown_model
from nybble.serve.record import RequestRecord
from nybble.tokenizer import Tokenizer
from nybble.tools import ToolPrompt

logger = logging.getLogger("nybble.serve")

SEEDS = 2**63
# Each answer has a table of its own, which is made in the event loop.
MOST_BIASES = 200_000


class Service:
    """A loaded model behind a running engine, under the names that clients may call it.

    request_seconds: what one request may take, from its arrival to its last token. log_prompts:
    they are written to the log, which otherwise has not a word of them.
    """

    def __init__(
        self,
        llm: LLM,
        engine: AsyncEngine,
        names: Sequence[str],
        request_seconds: float = 600.0,
        log_prompts: bool = False,
    ) -> None:
        if llm.tokenizer is None:
            raise ConfigError(str(no_tokenizer()))
        self.llm = llm
        self.engine = engine
        self.names = tuple(names)
        self.request_seconds = request_seconds
        self.log_prompts = log_prompts
        self.tokenizer: Tokenizer = llm.tokenizer
        self.grammars = GrammarCompiler(self.tokenizer, llm.engine.eos_ids, llm.engine.vocab_size)
        self.compiling = asyncio.Semaphore()
        self.created = int(time.time())
        self._longest_token = _longest_token(self.tokenizer)

    @property
    def max_context(self) -> int:
        return self.engine.engine.max_context

    def model(self, name: str | None) -> str:
        """The name to answer under; ApiError for a model that is not served."""
        if name is not None and name not in self.names:
            raise unknown_model(name, self.names)
        return name or self.names[0]

    def check_room(self, prompts: int, n: int) -> None:
        """Refuse n answers to each of some prompts before any work is done on them.

        ApiError where there is never room for so many, BusyError where there is none just now.
        """
        if prompts * n > self.engine.most:
            raise refused(
                "n" if n > 1 else "prompt",
                f"The request asks for {prompts * n} answers, and this server holds "
                f"{self.engine.most} at a time: send several requests.",
            )
        self.engine.check_room(prompts * n)

    # -- prompts, outside the event loop: a long one takes a while ---------------------------

    async def chat_ids(self, prompt: ToolPrompt, options: Mapping[str, Any]) -> list[int]:
        """The prompt of a chat; `options` go to the chat template."""
        self._check_length(
            sum(len(message["content"] or "") for message in prompt.messages) + len(prompt.reply),
            len(prompt.messages),
        )

        def ids() -> list[int]:
            chat = self.tokenizer.apply_chat(prompt.messages, prompt.tools, **options)
            return chat + self.tokenizer.encode(prompt.reply)

        return await asyncio.to_thread(ids)

    async def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_length(len(prompt))
        return await asyncio.to_thread(self.llm.encode, prompt)

    async def token_ids(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text, which may be empty; special: with what goes before a prompt."""
        self._check_length(len(text))
        prefix = self.tokenizer.prompt_prefix_ids if special else ()
        return [*prefix, *await asyncio.to_thread(self.tokenizer.encode, text)]

    def _check_length(self, characters: int, messages: int = 0) -> None:
        """CapacityError for what no context can hold, before the work of counting its tokens.

        The interpreter's lock is held for parts of that work: other requests' tokens would wait.
        """
        if characters > self.max_context * self._longest_token or messages > self.max_context:
            many = messages > self.max_context
            size = f"{messages:,} messages" if many else f"{characters:,} characters"
            raise CapacityError(
                f"The prompt has {size}, for which no context of {self.max_context} tokens has "
                "room: shorten it."
            )

    # -- answers -------------------------------------------------------------------------------

    def params(self, given: Mapping[str, Any], stop: tuple[str, ...] = ()) -> SamplingParams:
        """The model's own defaults, with what a request says in their place, and more stops.

        How long an answer may be is no matter of taste: left out, it is as far as the context
        goes, whatever the model's authors put down for their own examples.
        """
        params = replace(self.llm.default_params, **{"max_tokens": None, **given})
        return replace(params, stop=(*params.stop_texts, *stop))

    def start(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        n: int,
        record: RequestRecord,
        *,
        constraint: Callable[[], Constraint] | None = None,
        echoes: Sequence[int] | None = None,
    ) -> Answers:
        """Queue n answers to each prompt, all or none. Raises what AsyncEngine.submit does.

        constraint: makes a fresh one for each answer. echoes: each prompt comes before its
        answers, from this token of it on.
        """
        biases = len(prompts) * n * len(params.logit_bias or ())
        if biases > MOST_BIASES:
            raise refused(
                "logit_bias",
                f"logit_bias makes {biases:,} entries for all answers together, and "
                f"{MOST_BIASES:,} are taken: name fewer tokens, or ask for fewer answers.",
            )
        answers: list[Answer] = []
        try:
            for number, prompt in enumerate(prompts):
                echo = None if echoes is None else echoes[number]
                for choice in range(n):
                    rules = None if constraint is None else constraint()
                    generation = self.engine.submit(prompt, _seeded(params, choice), rules)
                    answers.append(Answer(len(answers), generation, self.tokenizer, echo))
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        if self.log_prompts:
            for prompt in prompts:
                logger.info("%s prompt: %s", record.id, self._quoted(prompt))
        return Answers(answers, n, record, self.request_seconds)

    def _quoted(self, prompt: list[int]) -> str:
        """One line of text, control tokens and all; ids where they stand for no text."""
        try:
            return json.dumps(self.tokenizer.decode(prompt), ensure_ascii=False)
        except RequestError:
            return str(prompt)


def _longest_token(tokenizer: Tokenizer) -> int:
    """The most bytes that one token stands for."""
    ids = set(range(tokenizer.vocab_size)) - tokenizer.unused_ids
    return max(len(tokenizer.decode_bytes([token])) for token in ids)


def _seeded(params: SamplingParams, choice: int) -> SamplingParams:
    """Each choice draws its own numbers: the seed counts on, and after the last begins again."""
    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=(params.seed + choice) % SEEDS)
