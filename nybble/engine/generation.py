"""The answer to one request, as whoever asked for it sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nybble.engine.request import Request
from nybble.engine.sampler import TokenLogprob

if TYPE_CHECKING:
    from nybble.engine.engine import Engine


class Generation(Iterator[int]):
    """The answer to one request: iterate it for tokens, which runs the engine's steps.

    finish_reason is set when it ends: "stop" (an end-of-turn or stop token, which is not part
    of the output) or "length" (max_tokens or the context is used up); None while running or
    when abandoned. prompt_logprobs: of the prompt's tokens but the first, where asked for; all
    are there when the first token is. Other requests of the engine advance in the same steps.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.prompt_ids = request.prompt_ids
        self.params = request.params
        self.timing = request.timing
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs = request.prompt_logprobs
        self.finish_reason: str | None = None
        self._engine, self._request = engine, request
        self._started = False

    def start(self) -> None:
        """Join the engine's queue now, not at the first token: to run with others at a time."""
        if not self._started:
            self._started = True
            self._engine.add(self._request)

    def __next__(self) -> int:
        self.start()
        request = self._request
        while not request.news and not request.done:
            self._engine.step()
        token = request.news.popleft() if request.news else None
        if token is None and request.error is not None:
            raise request.error
        if not request.news and request.finish_reason != "abort":
            self.finish_reason = request.finish_reason
        if token is None:
            raise StopIteration
        self.token_ids.append(token.id)
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        return token.id

    def close(self) -> None:
        """Abandon the request: the next step gives its pages back."""
        self._request.news.clear()
        self._engine.abort(self._request)

    def __del__(self) -> None:
        # Only marks: this may run in the middle of a step.
        self._engine.abort(self._request)
