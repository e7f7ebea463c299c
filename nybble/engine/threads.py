"""How many CPU threads a step runs on, found by trying.

Threads that meet at barriers are as slow as the one that waits for a core. Where other programs
hold some of them, fewer threads are faster: with one other program on two cores, one thread decodes
three times as fast as two (docs/LOG.md).
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_EVERY = 128  # steps between two looks at fewer threads
_SOON = 8  # steps to the next one after one that took _SPIKE times what others did
_SPIKE = 2.0
_LEAST = 4  # steps that must be known before others are compared with them
_DOWN_STEPS, _UP_STEPS = 2, 4  # how many a look takes
_WORTH = 1.25  # how much faster fewer threads must be
_PAUSE, _LONGEST_PAUSE = 2.0, 16.0  # seconds before more threads are tried again


@dataclass
class _Trial:
    level: int
    left: int


class ThreadCount:
    """Chooses between `most` threads and fewer, by what steps of one token a request take.

    Used by one engine, in whichever thread runs its steps.
    """

    def __init__(
        self,
        most: int,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        get_threads: Callable[[], int] = torch.get_num_threads,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counts = _ladder(most)
        self._set, self._get, self._clock = set_threads, get_threads, clock
        self._level = 0
        self._trial: _Trial | None = None
        self._work = 0
        self._steps = _EVERY - _SOON  # the first look comes early
        self._far = False
        self._pause, self._more_at = _PAUSE, 0.0
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=8))

    @property
    def count(self) -> int:
        return self.counts[self._trial.level if self._trial else self._level]

    @contextmanager
    def step(self, requests: int) -> Iterator[None]:
        """Around a step in which each of so many requests feeds one token; 0: any other step."""
        work = requests.bit_length()  # alike enough to compare
        if work and work != self._work:
            self._seconds.clear()
            self._trial = None
            self._work = work
        before, begin = self._get(), self._clock()
        if before != self.count:
            self._set(self.count)
        try:
            yield
        finally:
            if self._get() != before:
                self._set(before)
        if requests:
            self._note(self._clock() - begin)

    def _note(self, seconds: float) -> None:
        if self._trial is not None:
            self._seconds[self._trial.level].append(seconds)
            self._trial.left -= 1
            if self._trial.left == 0:
                self._judge(self._trial.level)
            return
        known, last = self._seconds[self._level], len(self.counts) - 1
        if known and seconds > _SPIKE * min(known):
            self._steps = max(self._steps, _EVERY - _SOON)
        known.append(seconds)
        self._steps += 1
        if len(known) < _LEAST:
            return
        if self._level and self._clock() >= self._more_at:
            self._try(self._level - 1, _UP_STEPS)
        elif self._level < last and self._steps >= _EVERY:
            # A step down, or all the way: with every core taken a few threads fewer bring nothing.
            self._far = not self._far
            self._try(last if self._far else self._level + 1, _DOWN_STEPS)

    def _try(self, level: int, steps: int) -> None:
        self._seconds[level].clear()
        self._trial, self._steps = _Trial(level, steps), 0

    def _judge(self, level: int) -> None:
        """Move to the level that was tried if it is faster."""
        self._trial = None
        present, tried = self._seconds[self._level], self._seconds[level]
        if level > self._level:
            if _WORTH * min(tried) < statistics.median(present):
                self._level, self._steps = level, _EVERY - _SOON
                self._more_at = self._clock() + self._pause
        elif statistics.median(tried) < statistics.median(present):
            self._level, self._pause = level, _PAUSE
        else:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._more_at = self._clock() + self._pause


def _ladder(most: int) -> list[int]:
    counts = [most]
    while counts[-1] > 1:
        counts.append(max(1, counts[-1] * 3 // 4))
    return counts
