"""Which tokens run in the next step: continuous batching over a pool of pages, as plain data.

Requests are admitted first come, first served. A running one is either decoding (one token a
step) or still has a prompt to compute, in chunks that share the step with the others' decoding
(Yu et al. 2022, Orca; Agrawal et al. 2023, Sarathi). When pages run out, the youngest request
gives its own back and computes them again later. Never touches a tensor.
"""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from nybble.cache.pages import PagePool, page_key
from nybble.errors import CapacityError

# As many rows of logits in one step as memory is sure to have room for.
LOGIT_ROWS = 512


@dataclass(eq=False)
class TokenSequence:
    """The tokens of one request and where their keys and values stand.

    tokens: prompt and answer so far; the engine appends. limit: the most it can ever have.
    alpha: how dynamic NTK stretches its positions, which decides keys beside the tokens. whole:
    somebody wants the logits of every token, so none is taken from the cache. seat: a number that
    no other running sequence has, below the most that run; -1 while it waits. Of `tokens`, the
    first `computed` stand in `pages`, which this sequence owns (one reference each) while it
    runs. `reused` counts those it found there since it runs, instead of computing them.
    """

    tokens: list[int]
    limit: int
    alpha: float = 1.0
    whole: bool = False
    pages: array[int] = field(default_factory=lambda: array("i"))
    computed: int = 0
    reused: int = 0
    seat: int = -1
    _keys: list[bytes] = field(default_factory=list, repr=False)

    @property
    def pending(self) -> int:
        """Tokens that no step has computed yet."""
        return len(self.tokens) - self.computed

    def key(self, index: int, page_size: int) -> bytes:
        """The name of page `index`, all of whose tokens are known."""
        while len(self._keys) <= index:
            begin = len(self._keys) * page_size
            parent = self._keys[-1] if self._keys else struct.pack("d", self.alpha)
            self._keys.append(page_key(parent, self.tokens[begin : begin + page_size]))
        return self._keys[index]


@dataclass(frozen=True)
class Chunk:
    """Tokens begin to end of a sequence, to be computed in one step.

    complete: the sequence has no further token, so the next one is sampled from the last row.
    """

    sequence: TokenSequence
    begin: int
    end: int
    complete: bool

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.begin : self.end]

    def slots(self, page_size: int) -> list[int]:
        """Where each token's keys and values go: page * page_size + offset."""
        pages = self.sequence.pages
        return [
            pages[position // page_size] * page_size + position % page_size
            for position in range(self.begin, self.end)
        ]


class Scheduler:
    """Decides step by step which of its sequences run, and owns what they hold of `pool`.

    step_tokens: the most tokens in one step. max_running: the most sequences at a time.
    Every running sequence is older than every waiting one, and both are in order of arrival.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        step_tokens: int,
        max_running: int,
        share_prefixes: bool = True,
    ) -> None:
        if not 1 <= max_running <= step_tokens:
            raise ValueError(f"{max_running} running sequences in steps of {step_tokens} tokens")
        self.pool = pool
        self.step_tokens = step_tokens
        self.max_running = max_running
        self.share_prefixes = share_prefixes
        self.waiting: deque[TokenSequence] = deque()
        self.running: list[TokenSequence] = []
        self.preemptions = 0
        self._free_seats = list(range(max_running))[::-1]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: TokenSequence) -> None:
        """Queue a sequence; CapacityError when it could not even run alone."""
        need, there = self.pool.pages_for(sequence.limit), self.pool.num_pages
        if need > there:
            size = self.pool.page_size
            raise CapacityError(
                f"The request may grow to {sequence.limit} tokens, and the cache holds "
                f"{there * size} ({there} pages of {size}): shorten the prompt, lower max_tokens, "
                "or give the cache more memory."
            )
        self.waiting.append(sequence)

    def remove(self, sequence: TokenSequence, *, sound: bool = True) -> None:
        """End a sequence, finished or not. Unless `sound`, nobody may reuse what it computed."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        if not sound:
            self.pool.forget(sequence.pages)
        self._give_back(sequence)

    def plan(self) -> list[Chunk]:
        """The next step; empty only when idle.

        Its tokens count as computed from now on: run it, or `clear`. In a step, keys and values
        of all chunks are stored before any is read; so a chunk may rest on a page that another
        chunk of the same step fills.
        """
        chunks = list(self._decode())
        self._admit()
        chunks += self._prefill(self.step_tokens - len(chunks))
        return chunks

    def clear(self, failed: Sequence[Chunk] = ()) -> None:
        """End every sequence; what the chunks of a step that failed would have stored is void."""
        for chunk in failed:
            self.pool.forget(chunk.sequence.pages[chunk.begin // self.pool.page_size :])
        self.waiting.clear()
        while self.running:
            self._give_back(self.running.pop())

    def check(self) -> None:
        """RuntimeError unless each page is accounted for, and waiting sequences hold none."""
        if any(sequence.pages or sequence.computed for sequence in self.waiting):
            raise RuntimeError("a waiting sequence holds pages or counts on them")
        seats = [sequence.seat for sequence in self.running] + self._free_seats
        if sorted(seats) != list(range(self.max_running)):
            raise RuntimeError("two running sequences share a seat, or one is lost")
        self.pool.check(page for sequence in self.running for page in sequence.pages)

    # -- decoding, and what happens when pages run out ----------------------------------------

    def _decode(self) -> Iterator[Chunk]:
        """One token for each sequence that has one, oldest first: younger ones make room."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.pending == 1 and self._room_for_one(sequence):
                yield self._take(sequence, 1)
            index += 1

    def _room_for_one(self, sequence: TokenSequence) -> bool:
        """Whether there is a slot for the next token, at the price of younger sequences."""
        if sequence.computed < len(sequence.pages) * self.pool.page_size:
            return True
        while not self.pool.available:
            youngest = self.running.pop()
            self._give_back(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        sequence.pages.extend(self.pool.allocate(1))
        return True

    def _give_back(self, sequence: TokenSequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = array("i")
        sequence.computed = 0
        self._free_seats.append(sequence.seat)
        sequence.seat = -1

    # -- admission ------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running and self._place():
            sequence = self.waiting.popleft()
            sequence.seat = self._free_seats.pop()
            self.running.append(sequence)

    def _place(self) -> bool:
        """Give the first of the queue the pages of all its tokens, if there are enough."""
        sequence, pool = self.waiting[0], self.pool
        shared = list(self._known_pages(sequence))
        wanted = pool.pages_for(len(sequence.tokens)) - len(shared)
        # A page more for each running one: the newcomer shall not be pushed out at once.
        if pool.available < wanted + len(self.running):
            pool.release(shared)
            return False
        sequence.pages = array("i", shared + pool.allocate(wanted))
        sequence.computed = sequence.reused = len(shared) * pool.page_size
        return True

    def _known_pages(self, sequence: TokenSequence) -> Iterator[int]:
        """Take the pages that already hold what comes next, as far as one token is left to run."""
        if sequence.whole:
            return
        size = self.pool.page_size
        for index in range(sequence.computed // size, (len(sequence.tokens) - 1) // size):
            page = self.pool.acquire(sequence.key(index, size))
            if page is None:
                return
            yield page

    # -- prompts --------------------------------------------------------------------------------

    def _prefill(self, budget: int) -> Iterator[Chunk]:
        """Half of the budget is for the oldest prompt, the rest for the shortest first.

        So a short prompt passes a long one, and no number of short ones stops a long one. Those
        that are read whole have a bound of their own.
        """
        prompts = [sequence for sequence in self.running if sequence.pending]
        shorter = sorted(prompts[1:], key=lambda sequence: sequence.pending)
        others = sum(sequence.pending for sequence in shorter)
        share = max(budget - others, (budget + 1) // 2)
        whole = LOGIT_ROWS
        for sequence in [*prompts[:1], *shorter]:
            self._skip_known(sequence)
            count = self._chunk_size(sequence, min(share, whole) if sequence.whole else share)
            if count == 0 and sequence.whole:
                continue
            if count == 0:
                return
            yield self._take(sequence, count)
            budget -= count
            whole -= count * sequence.whole
            share = budget

    def _skip_known(self, sequence: TokenSequence) -> None:
        """Exchange the next pages for equal ones that others have filled meanwhile."""
        size = self.pool.page_size
        if sequence.computed % size:
            return
        for page in self._known_pages(sequence):
            index = sequence.computed // size
            self.pool.release([sequence.pages[index]])
            sequence.pages[index] = page
            sequence.computed += size
            sequence.reused += size

    def _chunk_size(self, sequence: TokenSequence, share: int) -> int:
        """At most `share` tokens, up to the end of a page if that is possible."""
        if sequence.pending <= share:
            return sequence.pending
        over = (sequence.computed + share) % self.pool.page_size
        return share - over if over < share else share

    def _take(self, sequence: TokenSequence, count: int) -> Chunk:
        """Count the next tokens as computed; the pages they fill can be shared."""
        size, begin = self.pool.page_size, sequence.computed
        end = sequence.computed = begin + count
        if self.share_prefixes:
            for index in range(begin // size, end // size):
                self.pool.publish(sequence.pages[index], sequence.key(index, size))
        return Chunk(sequence, begin, end, complete=end == len(sequence.tokens))
