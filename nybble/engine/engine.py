"""Runs a decoder for many requests at a time. Knows ids and logits, never text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch

from nybble.cache.pages import PagePool
from nybble.cache.sizes import PAGE_SIZE, bytes_per_token, seat_count
from nybble.engine import replay
from nybble.engine.constraint import Constraint, Contained
from nybble.engine.generation import Generation
from nybble.engine.request import Request, Timing, Token
from nybble.engine.runner import Runner
from nybble.engine.sampler import Sampler
from nybble.engine.scheduler import Chunk, Scheduler, TokenSequence
from nybble.engine.threads import ThreadCount
from nybble.errors import (
    CapacityError,
    NumericsError,
    NybbleError,
    RequestError,
    UnavailableError,
)
from nybble.model.decoder import Decoder
from nybble.model.rope import ntk_alpha
from nybble.sampling import SamplingParams

# Log-probabilities of a prompt are computed for so many rows of logits at a time.
_SCORED_ROWS = 64
# What the cache may grow to where nobody says, and what it takes before it forgets prefixes.
_CACHE_BYTES, _WARM_BYTES = 2**31, 2**28


@dataclass(frozen=True)
class Load:
    """How busy the engine is: requests, and pages of the cache in use, kept for later, in all."""

    running: int
    waiting: int
    pages_used: int
    pages_cached: int
    num_pages: int


@dataclass
class Counters:
    """What the engine has done so far. reused_tokens: those of prompts found in the cache."""

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0


class Engine:
    """Generates for up to `max_running` requests in common steps; the others wait their turn.

    Ids from vocab_size on, and unused_ids, are never sampled; eos_ids end an answer;
    max_context bounds prompt and answer together; kv_dtype is a kind of KVLayer. A step takes
    prefill_chunk tokens at most. cache_tokens: how many the cache holds for all requests; None
    takes what a full context needs, or 2 GiB if that is more. threads: how many CPU threads a
    step runs on; None leaves torch's number. Not for two threads at a time, but `request` and
    `abort` may be called from any.
    """

    def __init__(  # noqa: PLR0913, all settings stand here once
        self,
        decoder: Decoder,
        *,
        vocab_size: int,
        eos_ids: Collection[int],
        max_context: int,
        kv_dtype: str,
        prefill_chunk: int,
        unused_ids: Sequence[int] = (),
        max_running: int = 64,
        cache_tokens: int | None = None,
        share_prefixes: bool = True,
        threads: ThreadCount | None = None,
    ) -> None:
        self.decoder = decoder
        self.device = decoder.backend.device
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.kv_dtype = kv_dtype
        self.prefill_chunk = prefill_chunk
        self.share_prefixes = share_prefixes
        self.token_bytes = bytes_per_token(decoder.config, kv_dtype)
        wanted = cache_tokens or max(max_context, _CACHE_BYTES // self.token_bytes)
        self.num_pages = -(-wanted // PAGE_SIZE)
        self.max_context = min(max_context, self.num_pages * PAGE_SIZE)
        seats = seat_count(kv_dtype, self.num_pages * PAGE_SIZE, max_running)
        self.max_running = min(seats, prefill_chunk)
        self.counters = Counters()
        self.scheduler = self._new_scheduler()
        self._runner = Runner(decoder, kv_dtype, self.num_pages, PAGE_SIZE, self.max_running)
        self._sampler = Sampler(vocab_size, self.device, unused_ids)
        self._threads = threads
        self._alive: dict[TokenSequence, Request] = {}
        self._aborted: deque[Request] = deque()

    def _new_scheduler(self) -> Scheduler:
        warm = _WARM_BYTES // self.token_bytes // PAGE_SIZE
        return Scheduler(
            PagePool(self.num_pages, PAGE_SIZE, warm),
            step_tokens=self.prefill_chunk,
            max_running=self.max_running,
            share_prefixes=self.share_prefixes,
        )

    # -- requests --------------------------------------------------------------------------

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        constraint: Constraint | None = None,
    ) -> Generation:
        """Check the request now, run it while the returned Generation is iterated.

        Raises RequestError or CapacityError at once, NumericsError while running.
        """
        return Generation(self, self.request(prompt_ids, params, constraint))

    def request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        constraint: Constraint | None = None,
    ) -> Request:
        """A checked request, which begins with `add`; RequestError or CapacityError.

        constraint: what the answer may become; a fresh one, which this request alone uses.
        """
        ids = list(prompt_ids)
        self.check_ids(ids)
        if constraint is not None and params.ignore_eos:
            raise RequestError(
                "An answer in a required form ends where the form does: leave ignore_eos out.",
                "ignore_eos",
            )
        room = self.max_context - len(ids)
        if room < (params.max_tokens != 0):
            raise CapacityError(
                f"The prompt has {len(ids)} tokens and the context {self.max_context}: shorten "
                "the prompt, or raise max_context if the model allows it."
            )
        contained = None if constraint is None else Contained(constraint)
        limit = len(ids) + (room if params.max_tokens is None else min(params.max_tokens, room))
        scored = params.prompt_logprobs is not None
        return Request(
            prompt_ids=ids,
            params=params,
            sequence=TokenSequence(list(ids), limit, self._alpha(ids), whole=scored),
            sampling=self._sampler.state(params, ids, contained),
            stop_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self.eos_ids),
            timing=Timing(prompt_tokens=len(ids)),
        )

    def add(self, request: Request) -> None:
        """Queue a request: the next steps run it. One that was aborted before stays ended."""
        if not request.done:
            self.scheduler.add(request.sequence)
            self._alive[request.sequence] = request

    def abort(self, request: Request) -> None:
        """End a request at the next step, wherever it stands. Harmless when it has ended."""
        self._aborted.append(request)

    @property
    def alive(self) -> list[Request]:
        """The requests that run or wait."""
        return list(self._alive.values())

    @property
    def idle(self) -> bool:
        return not self._alive

    @property
    def load(self) -> Load:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=pool.used,
            pages_cached=pool.cached,
            num_pages=pool.num_pages,
        )

    def check_ids(self, ids: list[int]) -> None:
        """RequestError unless ids is a non-empty list of ids that the model has rows for."""
        if not ids:
            raise RequestError("The prompt is empty: give at least one token.")
        rows = self.decoder.config.vocab_size
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < rows:
                raise RequestError(
                    f"{token!r} is not a token id of this model: use 0 to {rows - 1}."
                )

    def _alpha(self, ids: list[int]) -> float:
        config = self.decoder.config
        return ntk_alpha(len(ids), config.trained_context) if config.dynamic_ntk else 1.0

    # -- steps -----------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Run the next step; returns the requests that got a token or ended.

        An exception ends every request, with an error that says so, and leaves the engine ready
        for new ones.
        """
        chunks = None
        try:
            news = self._end_aborted()
            chunks = self.scheduler.plan()
            if chunks:
                news += self._run(chunks)
            if self.scheduler.idle:
                self.scheduler.check()
        except BaseException as error:
            self._fail(chunks, error)
            raise
        return news

    def _run(self, chunks: list[Chunk]) -> list[Request]:
        begin = time.perf_counter()
        decoding = len(chunks) if all(len(chunk) == 1 for chunk in chunks) else 0
        requests = [self._alive[chunk.sequence] for chunk in chunks]
        with self._threads.step(decoding) if self._threads else nullcontext():
            logits, finite = self._logits(chunks, requests)
            complete = [row for row, chunk in enumerate(chunks) if chunk.complete and finite[row]]
            rows = [row for row in complete if not requests[row].full]
            tokens = self._next_tokens(logits, requests, rows) if rows else {}
        self._clock(requests, time.perf_counter() - begin)
        for row in complete:
            self._receive(requests[row], tokens.get(row))
        broken = [request for request, good in zip(requests, finite, strict=True) if not good]
        for request in broken:
            request.error = self._not_finite(request.sequence)
            self._end(request, sound=False)
        return [requests[row] for row in complete] + broken

    def _logits(
        self, chunks: list[Chunk], requests: list[Request]
    ) -> tuple[torch.Tensor, list[bool]]:
        """fp32 (chunks, vocab) after each chunk, and whether all that it gave is finite."""
        scored = [row for row, request in enumerate(requests) if request.scoring]
        logits = self._runner.run(self.decoder, chunks, scored)
        # A sum is one pass, and a single Inf or NaN is enough to spoil it.
        finite = torch.isfinite(logits.sum(dim=-1))
        if not scored:
            return logits, finite.tolist()
        counts = [len(chunk) if row in scored else 1 for row, chunk in enumerate(chunks)]
        blocks = torch.split(logits, counts)
        good = [bool(part.all()) for part in torch.split(finite, counts)]
        for row in scored:
            if good[row]:
                self._score(requests[row], chunks[row], blocks[row])
        return torch.stack([block[-1] for block in blocks]), good

    def _score(self, request: Request, chunk: Chunk, logits: torch.Tensor) -> None:
        """Note how likely the prompt's tokens behind those of the chunk were, a few at a time."""
        prompt, found = request.prompt_ids, request.prompt_logprobs
        count, end = request.params.prompt_logprobs or 0, min(chunk.end, len(prompt) - 1)
        # A request that gave its pages back reads again what it has scored already.
        for begin in range(len(found), end, _SCORED_ROWS):
            stop = min(begin + _SCORED_ROWS, end)
            rows = logits[begin - chunk.begin : stop - chunk.begin]
            found += self._sampler.logprobs(rows, prompt[begin + 1 : stop + 1], count)

    def _next_tokens(
        self, logits: torch.Tensor, requests: list[Request], rows: list[int]
    ) -> dict[int, Token]:
        """By row, the token that is chosen there."""
        chosen = logits if len(rows) == len(logits) else logits[rows]
        ids = self._sampler.choose(chosen, [requests[row].sampling for row in rows])
        tokens = {row: Token(token) for row, token in zip(rows, ids, strict=True)}
        for row, token in tokens.items():
            count = requests[row].params.logprobs
            if count is not None:
                (logprob,) = self._sampler.logprobs(logits[row : row + 1], [token.id], count)
                tokens[row] = Token(token.id, logprob)
        return tokens

    def _clock(self, requests: list[Request], seconds: float) -> None:
        self.counters.steps += 1
        for request in requests:
            request.clock(seconds)

    def _receive(self, request: Request, token: Token | None) -> None:
        """token None: the prompt was all that was to be read."""
        timing, counters = request.timing, self.counters
        if timing.new_tokens == 0:
            timing.reused_tokens = request.sequence.reused
            counters.prompt_tokens += timing.prompt_tokens
            counters.reused_tokens += timing.reused_tokens
        if token is None:
            request.finish_reason = "length"
        else:
            counters.new_tokens += 1
            request.receive(token)
        if request.done:
            self._end(request)

    def _end(self, request: Request, sound: bool = True) -> None:
        del self._alive[request.sequence]
        self.scheduler.remove(request.sequence, sound=sound)

    def _end_aborted(self) -> list[Request]:
        ended = []
        while self._aborted:
            request = self._aborted.popleft()
            if not request.done:  # before the rest: an interrupt shall not lose it
                request.finish_reason = "abort"
            if request.sequence in self._alive:
                ended.append(request)
                self._end(request)
        return ended

    def _fail(self, chunks: list[Chunk] | None, error: BaseException) -> None:
        """End everything after a step that did not come to its end."""
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        for request in self._alive.values():
            request.error = UnavailableError(
                f"A step of the engine was broken off ({reason}): send the request again."
            )
        self._alive.clear()
        if chunks is not None:
            with suppress(RuntimeError, ValueError):
                self.scheduler.clear(chunks)
                self.scheduler.check()
                return
        self.scheduler = self._new_scheduler()  # broken off in the middle of the bookkeeping

    # -- outside the batch -----------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """fp32 (tokens, vocab): the model's prediction after each token.

        The whole sequence counts as the prompt; its length is not bounded by max_context.
        """
        ids = list(token_ids)
        self.check_ids(ids)
        alpha = self._alpha(ids)
        logits = replay.logits(self.decoder, ids, self.kv_dtype, alpha, self.prefill_chunk)
        if not bool(torch.isfinite(logits).all()):
            raise self._not_finite(TokenSequence(ids, len(ids), alpha))
        return logits

    def _not_finite(self, sequence: TokenSequence) -> NumericsError:
        """The guard against silent nonsense: runs the tokens again to name where it began."""
        try:
            part = replay.first_nonfinite(
                self.decoder, sequence.tokens, self.kv_dtype, sequence.alpha, self.prefill_chunk
            )
            where = f"they began in {part or 'a part that does not repeat it'}"
        except (NybbleError, RuntimeError) as error:  # no room for a second cache, most of all
            why = f"running the tokens again failed with {type(error).__name__}"
            where = f"where they began could not be looked for, since {why}"
        return NumericsError(
            f"The model computed values that are not finite; {where}. "
            "Check the checkpoint (nybble info), or load it with dtype float32."
        )
