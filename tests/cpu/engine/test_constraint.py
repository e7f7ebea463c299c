"""Constraints in the engine: only the tokens they allow, and no effect on anybody else."""

from __future__ import annotations

import asyncio

import pytest
import torch

from nybble.engine.constraint import WORD_BITS, allowed_tokens
from nybble.engine.loop import AsyncEngine
from nybble.errors import NybbleError, RequestError
from nybble.sampling import SamplingParams

VOCAB, END = 160, 7
PLAIN = SamplingParams(temperature=0, max_tokens=12)


class Steps:
    """Token number i must have the remainder i modulo `modulus`; END comes after `length`."""

    def __init__(self, modulus=5, length=8, dead_end=None):
        self.modulus, self.length, self.dead_end = modulus, length, dead_end
        self.accepted = []

    def next_tokens(self):
        count = len(self.accepted)
        if count == self.dead_end:
            return []
        if count >= self.length:
            return [END]
        return [t for t in range(VOCAB) if t % self.modulus == count % self.modulus and t != END]

    def fill(self, words):
        assert words.dtype == torch.int32
        bits = [0] * len(words)
        for token in self.next_tokens():
            bits[token // WORD_BITS] |= 1 << token % WORD_BITS
        words[:] = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits])

    def accept(self, token):
        if token not in self.next_tokens():
            return False
        self.accepted.append(token)
        return True


@pytest.fixture
def engine(make_engine, data):
    return make_engine(data / "qwen1-plain", max_context=200, eos_ids=(END,))


def run(engine, prompts, constraints, params=PLAIN):
    generations = [
        engine.generate(prompt, params, constraint)
        for prompt, constraint in zip(prompts, constraints, strict=True)
    ]
    for generation in generations:
        generation.start()
    answers = [(list(generation), generation.finish_reason) for generation in generations]
    assert engine.idle
    assert engine.load.pages_used == 0
    return answers


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 160])
def test_words_become_tokens(vocab):
    class Some:
        def fill(self, words):
            assert len(words) == -(-vocab // 32)
            words.fill_(0x40000001 - 2**31)  # bits 0, 30 and 31, the sign

    allowed = allowed_tokens([Some(), Some()], vocab, torch.device("cpu"))
    expected = [t % 32 in (0, 30, 31) for t in range(vocab)]
    assert allowed.tolist() == [expected, expected]


@pytest.mark.parametrize("temperature", [0, 2.5])
def test_every_token_is_an_allowed_one_and_the_end_comes_where_it_may(engine, temperature):
    params = SamplingParams(temperature=temperature, seed=3, top_p=0.9, repetition_penalty=1.1)
    [(ids, reason)] = run(engine, [[1, 2, 3]], [Steps()], params)
    assert [token % 5 for token in ids] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert reason == "stop"


def test_max_tokens_cuts_it_short(engine):
    params = SamplingParams(temperature=0, max_tokens=3)
    assert run(engine, [[1]], [Steps()], params)[0][1] == "length"


def test_neighbours_without_one_answer_as_if_alone(engine):
    prompts = [[3, 1, 4], [1, 5, 9, 2], [6, 5]]
    free = run(engine, prompts, [None, None, None])
    mixed = run(engine, prompts, [None, Steps(), None])
    assert [mixed[0], mixed[2]] == [free[0], free[2]]
    assert mixed[1] == run(engine, [prompts[1]], [Steps()])[0]
    assert mixed[1] != free[1]


def test_preemption_leaves_it_where_it_was(make_engine, data):
    prompts = [[i, *range(20, 60)] for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=60)

    def answers(**options):
        engine = make_engine(data / "qwen1-plain", max_context=200, eos_ids=(END,), **options)
        return run(engine, prompts, [Steps(length=50) for _ in prompts], params), engine

    expected, _ = answers()
    tight, engine = answers(cache_tokens=320)
    assert engine.scheduler.preemptions > 0
    assert tight == expected
    assert all(reason == "stop" for _, reason in tight)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_dead_end_ends_its_own_request(engine, temperature):
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=6)
    stuck = engine.generate([1, 2], params, Steps(dead_end=2))
    other = engine.generate([1, 2], params, Steps())
    stuck.start()
    other.start()
    with pytest.raises(RequestError, match="loosen the schema"):
        list(stuck)
    assert len(stuck.token_ids) == 2
    assert [token % 5 for token in other] == [0, 1, 2, 3, 4, 0]
    assert engine.load.pages_used == 0


class Faulty(Steps):
    """Raises in one of its methods once so many tokens have come."""

    def __init__(self, method, count):
        super().__init__()
        self.method, self.count = method, count

    def check(self, method):
        if method == self.method and len(self.accepted) == self.count:
            raise MemoryError("no room for states")

    def fill(self, words):
        super().fill(words)
        self.check("fill")

    def accept(self, token):
        self.check("accept")
        return super().accept(token)


@pytest.mark.parametrize("method", ["fill", "accept"])
@pytest.mark.parametrize("count", [0, 2])
def test_a_fault_ends_its_own_request(engine, method, count):
    faulty = engine.generate([1, 2], PLAIN, Faulty(method, count))
    other = engine.generate([1, 2], PLAIN, Steps())
    faulty.start()
    other.start()
    with pytest.raises(NybbleError, match=r"no room for states.*simplify the schema") as caught:
        list(faulty)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert len(faulty.token_ids) == count
    assert [token % 5 for token in other] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert engine.load.pages_used == 0


def test_ignoring_the_end_is_refused(engine):
    with pytest.raises(RequestError, match="leave ignore_eos out"):
        engine.request([1], SamplingParams(ignore_eos=True), Steps())


def test_in_the_loop(engine):
    async def answer():
        async with AsyncEngine(engine) as running:
            first, second = (running.submit([1, 2, 3], PLAIN, Steps()) for _ in range(2))
            return [token async for token in first], [token async for token in second]

    first, second = asyncio.run(answer())
    assert first == second == run(engine, [[1, 2, 3]], [Steps()])[0][0]
