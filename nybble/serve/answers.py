"""The answers to one request while they are generated: tokens -> pieces of text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType

from nybble.engine.loop import AsyncGeneration
from nybble.engine.sampler import TokenLogprob
from nybble.errors import NybbleError
from nybble.outputs import TextBuilder
from nybble.serve.errors import TooSlowError
from nybble.serve.record import RequestRecord
from nybble.serve.responses import PromptDetails, Usage
from nybble.serve.sse import ClientGoneError
from nybble.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class PlacedLogprob:
    """A token's log-probability, and where its text begins: characters of the whole text.

    Nothing is known of the first token of a prompt: None.
    """

    token: int
    logprob: TokenLogprob | None
    offset: int


@dataclass(frozen=True)
class Piece:
    """The next text of answer `index`; the last piece says why it ended ("stop", "length").

    logprobs: of the tokens since the last piece, where they were asked for.
    """

    index: int
    text: str
    logprobs: tuple[PlacedLogprob, ...] = ()
    finish_reason: str | None = None


class Answer:
    """One choice: iterate `pieces` once.

    echo: the first piece is the prompt, what its ids spell from number `echo` on.
    """

    def __init__(
        self,
        index: int,
        generation: AsyncGeneration,
        tokenizer: Tokenizer,
        echo: int | None = None,
    ) -> None:
        self.index = index
        self.generation = generation
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._text = TextBuilder(tokenizer, generation.params)
        self._echo = echo
        self._enough = False  # whether the reader has all that it wants
        self._begin = 0  # characters of the prompt before the answer
        self._logprobs: list[PlacedLogprob] = []

    async def pieces(self, record: RequestRecord) -> AsyncGenerator[Piece]:
        """What came while the reader was busy is one piece: a slow reader gets longer ones."""
        before: float | None = None
        text = ""
        async for token in self.generation:
            if self._echo is not None and before is None:
                yield self._prompt(self._echo)
            before = record.token(before)
            text += self._push(token)
            if self._text.stopped:
                self.close()
                break
            if text and not self.generation.ready:
                yield Piece(self.index, text, self._taken())
                text = ""
        else:
            if self._echo is not None and before is None:
                yield self._prompt(self._echo)
            text += self._text.finish()
        stopped = self._text.stopped or self._enough
        self.finish_reason = "stop" if stopped else self.generation.finish_reason
        logprobs = self._taken() if self._text.stopped else tuple(self._logprobs)
        yield Piece(self.index, text, logprobs, self.finish_reason)

    def _prompt(self, first: int) -> Piece:
        decoder = StreamDecoder(self._tokenizer)
        text, begins = "", []
        for number, token in enumerate(self.generation.prompt_ids):
            begins.append(len(text))
            if number >= first:
                text += decoder.push(token)
        text += decoder.finish()
        self._begin = len(text)
        return Piece(self.index, text, self._prompt_logprobs(begins))

    def _prompt_logprobs(self, begins: Sequence[int]) -> tuple[PlacedLogprob, ...]:
        generation = self.generation
        if generation.params.logprobs is None:
            return ()
        found = [None, *generation.prompt_logprobs]
        return tuple(map(PlacedLogprob, generation.prompt_ids, found, begins))

    def _push(self, token: int) -> str:
        if self.generation.params.logprobs is not None:
            offset = self._begin + self._text.decoded
            self._logprobs.append(PlacedLogprob(token, self.generation.logprobs[-1], offset))
        return self._text.push(token)

    def _taken(self) -> tuple[PlacedLogprob, ...]:
        """Of the tokens whose text has been passed on: what is held back may become a stop."""
        end = self._begin + self._text.given
        taken = tuple(placed for placed in self._logprobs if placed.offset < end)
        del self._logprobs[: len(taken)]
        return taken

    def close(self, error: NybbleError | None = None) -> None:
        """End it where it stands; error: what its reader is told."""
        self.generation.close(error)

    def stop(self) -> None:
        """End it as a stop string would: its reader has all that it wants."""
        self._enough = True
        self.close()


class Answers:
    """All choices of one request: `async with` it, so that none runs on unread.

    They come prompt by prompt, `n` each. A reader that leaves, an error, or `seconds` since the
    request's arrival end all of them.
    """

    def __init__(
        self, answers: Sequence[Answer], n: int, record: RequestRecord, seconds: float
    ) -> None:
        self._answers = answers
        self._n = n
        self._record = record
        self._seconds = seconds
        self._reason = "abort"

    async def __aenter__(self) -> Answers:
        self._record.started()
        left = max(self._seconds - self._record.seconds, 0.0)
        self._alarm = asyncio.get_running_loop().call_later(left, self._expire)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._alarm.cancel()
        for answer in self._answers:
            answer.close()
        usage = self.usage
        failed = isinstance(error, Exception) and not isinstance(error, ClientGoneError)
        reason = "error" if failed else self._reason
        self._record.finished(reason, usage.prompt_tokens, usage.completion_tokens)

    def __len__(self) -> int:
        return len(self._answers)

    def stop(self, index: int) -> None:
        """Generate no more of one answer: its last piece comes next."""
        self._answers[index].stop()

    def _expire(self) -> None:
        for answer in self._answers:
            answer.close(TooSlowError(self._seconds))

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The pieces of all answers as they come; raises the first error of any."""
        async with aclosing(self._merged()) as pieces:
            async for piece in pieces:
                yield piece
        self._reason = self._answers[0].finish_reason or "stop"

    def _merged(self) -> AsyncGenerator[Piece]:
        if len(self._answers) == 1:
            return self._answers[0].pieces(self._record)
        return merged([answer.pieces(self._record) for answer in self._answers])

    @property
    def usage(self) -> Usage:
        """The tokens so far; each prompt counts once."""
        prompts = [answer.generation for answer in self._answers[:: self._n]]
        prompt = sum(len(generation.prompt_ids) for generation in prompts)
        new = sum(len(answer.generation.token_ids) for answer in self._answers)
        reused = sum(generation.timing.reused_tokens for generation in prompts)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=new,
            total_tokens=prompt + new,
            prompt_tokens_details=PromptDetails(cached_tokens=reused),
        )


async def merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[Piece]:
    """What comes from any of the sources; the first error of any."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def read(source: AsyncIterator[Piece]) -> None:
        try:
            async for piece in source:
                queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001, it is raised where the pieces are read
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(source)) for source in sources]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
