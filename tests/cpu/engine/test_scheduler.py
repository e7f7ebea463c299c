"""The scheduler alone: fairness, preemption, sharing, and that what a step reads is right."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nybble.cache.pages import PagePool
from nybble.engine.scheduler import Scheduler, TokenSequence
from nybble.errors import CapacityError

SIZE = 4


class Machine:
    """Runs plans on a cache whose slots hold what a key depends on: alpha and all tokens so far.

    Next tokens follow from the tokens before them, so any mix-up of pages shows in the answer.
    """

    def __init__(self, pages=16, step_tokens=8, max_running=4, **options):
        self.pool = PagePool(pages, SIZE)
        self.scheduler = Scheduler(
            self.pool, step_tokens=step_tokens, max_running=max_running, **options
        )
        self.memory = [None] * (pages * SIZE)
        self.finished = []
        self.computed = 0

    def add(self, tokens, new=3, alpha=1.0):
        sequence = TokenSequence(list(tokens), len(tokens) + new, alpha)
        self.scheduler.add(sequence)
        return sequence

    def step(self):
        plan = self.scheduler.plan()
        assert sum(map(len, plan)) <= self.scheduler.step_tokens
        assert len({chunk.sequence for chunk in plan}) == len(plan)
        for chunk in plan:
            self._store(chunk)
        for chunk in plan:
            self._read(chunk)
        self.computed += sum(map(len, plan))
        return plan

    def drain(self, limit=1000):
        for _ in range(limit):
            if not self.step():
                assert self.scheduler.idle
                return
        raise AssertionError("the scheduler does not come to an end")

    def _store(self, chunk):
        slots = chunk.slots(SIZE)
        assert len(slots) == len(chunk) == len(chunk.tokens) > 0
        for slot, position in zip(slots, range(chunk.begin, chunk.end), strict=True):
            self.memory[slot] = content(chunk.sequence, position)

    def _read(self, chunk):
        sequence = chunk.sequence
        for position in range(chunk.end):
            slot = sequence.pages[position // SIZE] * SIZE + position % SIZE
            assert self.memory[slot] == content(sequence, position)
        assert chunk.complete == (chunk.end == len(sequence.tokens))
        if chunk.complete:
            sequence.tokens.append(next_token(sequence.tokens))
            if len(sequence.tokens) >= sequence.limit:
                self.scheduler.remove(sequence)
                self.finished.append(sequence)


def content(sequence, position):
    return sequence.alpha, tuple(sequence.tokens[: position + 1])


def next_token(tokens):
    return (sum(tokens) * 31 + len(tokens)) % 101


def answer(tokens, new):
    tokens = list(tokens)
    for _ in range(new):
        tokens.append(next_token(tokens))
    return tokens


def test_one_request_from_prompt_to_end():
    machine = Machine()
    sequence = machine.add(range(10), new=3)
    assert [len(machine.step()[0]) for _ in range(4)] == [8, 2, 1, 1]
    assert sequence.tokens == answer(range(10), 3)
    assert machine.step() == []
    assert machine.scheduler.idle
    machine.scheduler.check()


def test_first_come_first_served():
    machine = Machine(max_running=2)
    a, b, c = (machine.add([token] * 3) for token in range(3))
    machine.step()
    assert machine.scheduler.running == [a, b]
    assert list(machine.scheduler.waiting) == [c]


def test_decoding_goes_on_beside_a_long_prompt():
    machine = Machine(pages=40)
    short = machine.add([1, 2], new=9)
    machine.step()
    machine.add(range(100))
    for _ in range(4):
        plan = machine.step()
        assert plan[0].sequence is short
        assert len(plan[0]) == 1
        assert len(plan[1]) >= 4


def test_a_short_prompt_passes_a_long_one():
    machine = Machine(pages=40)
    machine.add(range(100))
    machine.step()
    short = machine.add([5, 6, 7], new=1)
    machine.step()
    assert machine.finished == [short]


def test_a_short_prompt_passes_several_long_ones():
    machine = Machine(pages=80)
    for number in range(2):
        machine.add([*range(60), number])
    short = machine.add([5, 6, 7], new=1)
    machine.step()
    assert machine.finished == [short]


def test_chunks_end_where_pages_end():
    machine = Machine(step_tokens=11)
    sequence = machine.add(range(30), new=1)
    machine.step()
    assert sequence.computed == 8
    tight = Machine(step_tokens=3, max_running=3)
    sequence = tight.add(range(11), new=1)
    computed = [tight.step() and sequence.computed for _ in range(4)]
    assert computed == [3, 4, 7, 8]


def test_a_stream_of_short_prompts_does_not_stop_a_long_one():
    machine = Machine(pages=60, step_tokens=16, max_running=8)
    long = machine.add(range(100), new=1)
    steps = 0
    while long not in machine.finished:
        for _ in range(4):
            machine.add([steps % 7, 1, 2, 3, 4], new=2)
        machine.step()
        steps += 1
    assert steps <= 30


def test_the_middle_of_the_queue_is_reached_beside_a_stream_of_short_prompts():
    machine = Machine(pages=80, step_tokens=16, max_running=6)
    longs = [machine.add([*range(60), number], new=1) for number in range(3)]
    for step in range(60):
        machine.add([step % 7, 1, 2, 3, 4], new=2)
        machine.step()
    assert all(long in machine.finished for long in longs)


def test_what_can_never_fit_is_refused_at_once_with_the_numbers():
    machine = Machine(pages=4)
    with pytest.raises(CapacityError, match=r"17 tokens.*holds 16 \(4 pages of 4\)"):
        machine.add(range(10), new=7)
    assert machine.scheduler.idle
    machine.add(range(10), new=6)
    machine.drain()


def test_the_youngest_makes_room_and_still_gets_its_answer():
    machine = Machine(pages=6, share_prefixes=False)
    old = machine.add([1, 2, 3], new=20)
    young = machine.add([4, 5, 6], new=20)
    machine.drain()
    assert machine.scheduler.preemptions > 0
    assert machine.finished == [old, young]
    assert old.tokens == answer([1, 2, 3], 20)
    assert young.tokens == answer([4, 5, 6], 20)


def test_those_that_made_room_come_before_those_that_came_later():
    machine = Machine(pages=5, step_tokens=32, max_running=3, share_prefixes=False)
    sequences = [machine.add([token] * 4, new=4) for token in range(5)]
    for _ in range(2):
        machine.step()
    assert list(machine.scheduler.waiting) == sequences[2:]


def test_a_newcomer_leaves_each_running_one_a_page():
    machine = Machine(pages=4, step_tokens=32, share_prefixes=False)
    machine.add(range(12), new=4)
    young = machine.add([1, 2], new=2)
    machine.drain()
    assert machine.scheduler.preemptions == 0
    assert young.tokens == answer([1, 2], 2)


def test_the_youngest_waits_when_it_needs_a_page_itself():
    machine = Machine(pages=5, step_tokens=32, share_prefixes=False)
    old, middle, young = (machine.add([token] * 4, new=4) for token in range(3))
    machine.step()
    assert machine.scheduler.running == [old, middle, young]
    machine.step()
    assert machine.scheduler.running == [old, middle]
    assert list(machine.scheduler.waiting) == [young]
    machine.drain()
    assert young.tokens == answer([2] * 4, 4)


def test_a_request_in_the_queue_or_running_can_be_removed_at_any_time():
    machine = Machine(max_running=1)
    running, waiting = machine.add(range(20)), machine.add(range(5))
    machine.step()
    machine.scheduler.remove(waiting)
    machine.scheduler.remove(running)
    assert machine.scheduler.idle
    machine.scheduler.check()
    assert machine.pool.used == 0


def test_a_later_request_takes_the_pages_of_an_earlier_one():
    machine = Machine()
    machine.add(range(10), new=4)
    machine.drain()
    before = machine.computed
    again = machine.add([*range(10), 77], new=1)
    machine.drain()
    assert again.reused == 8
    assert machine.computed - before == 3


def test_what_is_found_again_after_making_room_is_counted_once():
    machine = Machine(pages=24, step_tokens=4)
    prompt = list(range(1000, 1060))
    machine.add(prompt[:42], new=1)
    machine.drain()
    for number in range(3):
        machine.add(range(100 * number, 100 * number + 4), new=36)
    young = machine.add(prompt, new=4)
    machine.drain()
    assert machine.scheduler.preemptions > 1
    assert young.reused <= len(prompt)


def test_an_answer_can_be_reused_too_but_its_last_token_runs():
    machine = Machine()
    first = machine.add(range(6), new=3)
    machine.drain()
    assert len(first.tokens) == 9
    again = machine.add(first.tokens[:8], new=1)
    machine.drain()
    assert again.reused == 4  # the second page holds the last token of this prompt
    assert again.tokens == answer(range(6), 3)


def test_no_reuse_across_alphas_or_when_switched_off():
    machine = Machine()
    machine.add(range(10), alpha=3.0)
    machine.drain()
    other = machine.add(range(10), alpha=7.0)
    machine.drain()
    assert other.reused == 0
    off = Machine(share_prefixes=False)
    for _ in range(2):
        sequence = off.add(range(10))
        off.drain()
        assert sequence.reused == 0


def test_requests_that_come_together_share_one_computation_of_their_prefix():
    machine = Machine(pages=64, step_tokens=32, max_running=8)
    prefix = list(range(40))
    sequences = [machine.add([*prefix, 50 + number], new=1) for number in range(8)]
    machine.drain()
    assert machine.computed == len(prefix) + len(sequences)
    assert all(s.tokens == answer([*prefix, 50 + n], 1) for n, s in enumerate(sequences))


def test_what_is_read_whole_reuses_nothing_and_leaves_room_for_the_logits():
    machine = Machine(pages=1000, step_tokens=2000)
    machine.add(range(700))
    machine.drain()
    whole = [TokenSequence(list(range(700)), 701, whole=True) for _ in range(2)]
    for sequence in whole:
        machine.scheduler.add(sequence)
    other = machine.add(range(1000, 1600))
    plan = machine.step()
    assert sum(len(chunk) for chunk in plan if chunk.sequence in whole) == 512
    assert other.pending == 1  # its prompt is read, its first token is there
    machine.drain()
    assert [sequence.reused for sequence in whole] == [0, 0]


def test_shared_pages_are_the_same_pages():
    machine = Machine(pages=32, step_tokens=16)
    prefix = list(range(16))
    a, b = machine.add([*prefix, 1], new=5), machine.add([*prefix, 2], new=5)
    for _ in range(3):
        machine.step()
    assert a.pages[:4] == b.pages[:4]
    assert a.pages[4] != b.pages[4]
    assert machine.pool.used == 4 + len(a.pages[4:]) + len(b.pages[4:])


def test_unsound_pages_are_not_reused():
    machine = Machine()
    broken = machine.add(range(10), new=9)
    machine.step()
    machine.step()
    machine.scheduler.remove(broken, sound=False)
    assert machine.pool.cached == 0
    again = machine.add(range(10))
    machine.drain()
    assert again.reused == 0


def test_a_step_that_failed_leaves_only_what_was_computed_before_it():
    machine = Machine(pages=32)
    machine.add(range(12), new=9)
    machine.step()
    failed = machine.scheduler.plan()
    waiting = machine.add(range(3))
    machine.scheduler.clear(failed)
    assert machine.scheduler.idle
    assert not waiting.pages
    machine.scheduler.check()
    again = machine.add(range(12), new=9)
    machine.drain()
    assert again.reused == 8
    assert again.tokens == answer(range(12), 9)


def test_check_notices_a_page_that_nobody_owns():
    machine = Machine()
    sequence = machine.add(range(10))
    machine.step()
    sequence.pages.pop()
    with pytest.raises(RuntimeError, match="owners"):
        machine.scheduler.check()


def test_more_running_than_tokens_in_a_step_is_refused():
    with pytest.raises(ValueError, match="5 running"):
        Machine(step_tokens=4, max_running=5)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, aborts and steps in any order; few different tokens, so prefixes are shared."""

    @initialize(pages=st.integers(6, 14), budget=st.integers(3, 12), share=st.booleans())
    def start(self, pages, budget, share):
        self.machine = Machine(pages, budget, max_running=3, share_prefixes=share)
        self.alive = []
        self.expected = {}

    @rule(prompt=PROMPTS, new=st.integers(1, 12), alpha=st.sampled_from([1.0, 3.0]))
    def arrive(self, prompt, new, alpha):
        if len(prompt) + new > self.machine.pool.num_pages * SIZE:
            with pytest.raises(CapacityError):
                self.machine.add(prompt, new, alpha)
            return
        sequence = self.machine.add(prompt, new, alpha)
        self.alive.append(sequence)
        self.expected[sequence] = answer(prompt, new)

    @rule()
    def step(self):
        plan = self.machine.step()
        assert plan or self.machine.scheduler.idle
        self.alive = [s for s in self.alive if s not in self.machine.finished]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), sound=st.booleans())
    def abort(self, data, sound):
        sequence = data.draw(st.sampled_from(self.alive))
        self.alive.remove(sequence)
        self.machine.scheduler.remove(sequence, sound=sound)

    @invariant()
    def pages_are_accounted_for(self):
        self.machine.scheduler.check()
        for sequence in self.machine.finished:
            assert sequence.tokens == self.expected[sequence]
        held = {*self.machine.scheduler.running, *self.machine.scheduler.waiting}
        assert held == set(self.alive)

    def teardown(self):
        if not hasattr(self, "machine"):
            return
        self.machine.drain()
        assert set(self.alive) <= set(self.machine.finished)
        self.machine.scheduler.check()
        assert self.machine.pool.used == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
