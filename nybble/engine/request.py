"""One request on its way through the engine, from its prompt to its last token."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nybble.engine.sampler import SamplingState, TokenLogprob
from nybble.engine.scheduler import TokenSequence
from nybble.errors import NybbleError, RequestError
from nybble.sampling import SamplingParams


@dataclass
class Timing:
    """Seconds and tokens of one generation; `reused_tokens` came from the cache.

    The seconds are those of the steps in which the request took part: waiting in the queue,
    and for whoever reads the answer, is not in them.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first one, which the prefill yields."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Token:
    """One token of an answer; logprob where the request asked for it."""

    id: int
    logprob: TokenLogprob | None = None


@dataclass(eq=False)
class Request:
    """What the engine knows of a request. Whoever reads the answer takes tokens out of `news`.

    prompt_logprobs: of the prompt's tokens but the first, where asked for; all of them are there
    before the first token of the answer.

    finish_reason: "stop" (an end-of-turn or stop token, which is not part of the answer),
    "length" (max_tokens or the context is used up) or "abort"; error: why it cannot go on.
    One of the two is set when the last token has come.
    """

    prompt_ids: list[int]
    params: SamplingParams
    sequence: TokenSequence
    sampling: SamplingState
    stop_ids: frozenset[int]
    news: deque[Token] = field(default_factory=deque)
    finish_reason: str | None = None
    error: NybbleError | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still to come."""
        wanted = 0 if self.params.prompt_logprobs is None else len(self.prompt_ids) - 1
        return len(self.prompt_logprobs) < wanted

    @property
    def full(self) -> bool:
        """Whether there is no room for another token."""
        return len(self.sequence.tokens) == self.sequence.limit

    def _check_form(self, token: Token) -> None:
        constraint = self.sampling.constraint
        if constraint is not None and not constraint.accept(token.id):
            raise RequestError(
                "No token of this model continues the answer in the required form: loosen the "
                "schema, or ask without one."
            )

    def clock(self, seconds: float) -> None:
        """Count a step that this request took part in."""
        if self.timing.new_tokens == 0:
            self.timing.prefill_seconds += seconds
        else:
            self.timing.decode_seconds += seconds

    def receive(self, token: Token) -> None:
        """Take the next token: it ends the answer or is its next one."""
        self.timing.new_tokens += 1
        try:
            self._check_form(token)
        except NybbleError as error:
            self.error = error
            return
        if token.id in self.stop_ids:
            self.finish_reason = "stop"
            return
        self.sequence.tokens.append(token.id)
        self.news.append(token)
        if self.full:
            self.finish_reason = "length"
