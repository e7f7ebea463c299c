"""Runs the prompts of a batch through the engine's scheduler, a bounded number at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.batch.answers import Answers
from nybble.batch.rows import Row
from nybble.engine.engine import Counters
from nybble.engine.request import Request
from nybble.errors import CapacityError, NumericsError, RequestError
from nybble.llm import LLM
from nybble.outputs import TextBuilder, no_tokenizer
from nybble.sampling import SamplingParams

# Of one prompt and its model: the next prompt may well be fine.
_OF_A_ROW = (RequestError, CapacityError, NumericsError)


@dataclass(frozen=True)
class State:
    """Where a batch stands: rows, tokens a second, seconds left (None until a row has ended)."""

    done: int
    total: int
    rate: float
    seconds_left: float | None


Progress = Callable[[State], None]
"""Called after every step."""


@dataclass(frozen=True)
class Summary:
    """rows and failed: of the whole file; tokens and seconds: of this run alone."""

    rows: int
    failed: int
    new_tokens: int
    seconds: float


@dataclass(frozen=True)
class _Running:
    """An answer that is being made."""

    row: Row
    request: Request
    text: TextBuilder
    pieces: list[str]
    tokens: list[int]


class Batch:
    """Answers rows with a model; `params` hold for what a row leaves open.

    Twice as many requests are in flight as the engine runs at a time: enough for it never to
    wait, and no more than that in memory, however long the file is.
    """

    def __init__(
        self,
        llm: LLM,
        answers: Answers,
        params: SamplingParams,
        progress: Progress = lambda state: None,
    ) -> None:
        if llm.tokenizer is None:
            raise no_tokenizer()
        self._llm, self._tokenizer, self._engine = llm, llm.tokenizer, llm.engine
        self._answers, self._params, self._progress = answers, params, progress
        self._running: dict[Request, _Running] = {}

    def run(self, rows: Sequence[Row]) -> Summary:
        """Answer what is not answered yet, then write the output.

        A row that cannot run gets an answer with `error` instead of `text`.
        """
        clock = _Clock(self._engine.counters, len(self._answers), len(rows))
        queue = deque(row for row in rows if row.line not in self._answers)
        try:
            while queue or self._running:
                self._fill(queue)
                for request in self._engine.step():
                    self._receive(request)
                self._progress(clock.state(len(self._answers)))
        finally:
            for request in self._running:
                self._engine.abort(request)
        self._answers.finish(row.line for row in rows)
        return Summary(len(rows), self._answers.failed, clock.tokens, clock.seconds)

    def _fill(self, queue: deque[Row]) -> None:
        while queue and len(self._running) < 2 * self._engine.max_running:
            row = queue.popleft()
            try:
                self._start(row)
            except _OF_A_ROW as error:
                self._add(row, {"error": str(error)})

    def _start(self, row: Row) -> None:
        params = row.params(self._params)
        request = self._engine.request(self._ids(row), params)
        self._engine.add(request)
        text = TextBuilder(self._tokenizer, params)
        self._running[request] = _Running(row, request, text, [], [])

    def _ids(self, row: Row) -> list[int]:
        if row.messages is not None:
            return self._llm.chat_ids(row.messages)
        return self._llm.encode(row.prompt or "")

    def _receive(self, request: Request) -> None:
        """Take what a step made of a request; one that was stopped before is unknown by now."""
        answer = self._running.get(request)
        if answer is None:
            return
        while request.news and not answer.text.stopped:
            token = request.news.popleft().id
            answer.tokens.append(token)
            answer.pieces.append(answer.text.push(token))
        if answer.text.stopped:
            self._engine.abort(request)
            self._finish(answer)
        elif request.done:
            self._finish(answer)

    def _finish(self, answer: _Running) -> None:
        request = answer.request
        del self._running[request]
        if isinstance(request.error, _OF_A_ROW):
            self._add(answer.row, {"error": str(request.error)})
            return
        if request.error is not None:
            raise request.error
        if not answer.text.stopped:
            answer.pieces.append(answer.text.finish())
        self._add(
            answer.row,
            {
                "text": "".join(answer.pieces),
                "finish_reason": "stop" if answer.text.stopped else request.finish_reason,
                "prompt_tokens": len(request.prompt_ids),
                "new_tokens": len(answer.tokens),
            },
        )

    def _add(self, row: Row, answer: Mapping[str, Any]) -> None:
        self._answers.add(row.line, answer if row.id is None else {"id": row.id, **answer})


class _Clock:
    """What has been done since the beginning of this run, and how long the rest will take."""

    def __init__(self, counters: Counters, done: int, total: int) -> None:
        self._counters, self._done, self._total = counters, done, total
        self._tokens, self._begin = counters.new_tokens, time.perf_counter()

    @property
    def tokens(self) -> int:
        return self._counters.new_tokens - self._tokens

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def state(self, done: int) -> State:
        fresh, seconds = done - self._done, self.seconds
        left = seconds / fresh * (self._total - done) if fresh else None
        return State(done, self._total, self.tokens / seconds, left)
