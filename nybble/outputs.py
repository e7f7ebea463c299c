"""What a request gives back: text, ids and why it ended, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from nybble.engine.generation import Generation
from nybble.engine.request import Timing
from nybble.engine.sampler import TokenLogprob
from nybble.errors import RequestError
from nybble.sampling import SamplingParams
from nybble.tokenizer import StopMatcher, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Completion:
    """One finished answer.

    token_ids: what was generated, without the token that ended it. finish_reason: "stop" (end
    of turn, stop token or stop string) or "length". logprobs: one a token if they were asked for;
    prompt_logprobs: the same for the prompt's tokens but the first.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    timing: Timing
    decoded: str | None
    prompt_logprobs: list[TokenLogprob] | None = None

    @property
    def text(self) -> str:
        """The answer as text; RequestError where the model folder has no tokenizer."""
        if self.decoded is None:
            raise no_tokenizer()
        return self.decoded


class TextStream:
    """An answer as it comes: iterate for pieces of text, then read `completion`.

    The pieces joined are `completion.text`. Without a tokenizer every piece is empty, one a
    token. `close` (or leaving the iteration for good) ends the request.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer | None) -> None:
        self.generation = generation
        self._tokenizer = tokenizer
        self._decoded = ""
        self._stopped = False
        if tokenizer is None and generation.params.stop_texts:
            raise no_tokenizer()
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def start(self) -> None:
        """Let the request join the engine's queue now, not when the first piece is asked for."""
        self.generation.start()

    def close(self) -> None:
        """End the request where it stands; what came so far stays readable."""
        self._pieces.close()
        self.generation.close()

    @property
    def completion(self) -> Completion:
        """The whole answer; RequestError while it is still being generated."""
        generation = self.generation
        reason = "stop" if self._stopped else generation.finish_reason
        if reason is None:
            raise RequestError("The answer is not finished: iterate the stream to its end first.")
        params = generation.params
        return Completion(
            prompt_token_ids=generation.prompt_ids,
            token_ids=generation.token_ids,
            finish_reason=reason,
            logprobs=None if params.logprobs is None else generation.logprobs,
            timing=generation.timing,
            decoded=None if self._tokenizer is None else self._decoded,
            prompt_logprobs=None if params.prompt_logprobs is None else generation.prompt_logprobs,
        )

    def _run(self) -> Generator[str]:
        for piece in self._text_pieces():
            self._decoded += piece
            yield piece

    def _text_pieces(self) -> Iterator[str]:
        if self._tokenizer is None:
            yield from ("" for _ in self.generation)
            return
        text = TextBuilder(self._tokenizer, self.generation.params)
        for token in self.generation:
            piece = text.push(token)
            self._stopped = text.stopped
            if piece:
                yield piece
            if self._stopped:
                self.generation.close()
                return
        piece = text.finish()
        self._stopped = text.stopped
        if piece:
            yield piece


class TextBuilder:
    """Tokens of one answer -> pieces of its text, up to a stop string, which is left out.

    decoded: characters that the tokens so far have spelled; given: those that were passed on.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._matcher = StopMatcher(params.stop_texts)
        self.decoded = 0
        self.given = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: no further token belongs to the text."""
        return self._matcher.stop is not None

    def push(self, token: int) -> str:
        """What is certain to be text by now; empty where a character or stop may be cut."""
        piece, _ = self._matcher.push(self._decode(self._decoder.push(token)))
        return self._give(piece)

    def finish(self) -> str:
        """What was held back, after the last token."""
        piece, stop = self._matcher.push(self._decode(self._decoder.finish()))
        return self._give(piece if stop is not None else piece + self._matcher.finish())

    def _decode(self, text: str) -> str:
        self.decoded += len(text)
        return text

    def _give(self, text: str) -> str:
        self.given += len(text)
        return text


def no_tokenizer() -> RequestError:
    return RequestError(
        "This model folder has no tokenizer (qwen.tiktoken or tokenizer.json): give and take "
        "token ids, or add the tokenizer's files to the folder."
    )
