"""The engine behind asyncio: streams, aborts, shutdown, and exceptions that must not hang."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
import torch

from nybble.engine.loop import AsyncEngine
from nybble.errors import BusyError, CapacityError, NumericsError, RequestError, UnavailableError
from nybble.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
LONG = SamplingParams(temperature=0, max_tokens=1500)
PROMPTS = [[number, 3, 14, 15] for number in range(12)]


@pytest.fixture
def engine(make_engine, data):
    return make_engine(data / "qwen1-plain", max_context=2000, max_running=8)


def serve(test, engine, **options):
    """Run `await test(running)` against the engine, and see that nothing is left behind."""

    async def main():
        async with AsyncEngine(engine, **options) as running:
            await test(running)
        assert running.unfinished == 0
        assert not running._thread.is_alive()

    asyncio.run(asyncio.wait_for(main(), timeout=60))


async def ids_of(stream):
    return [token async for token in stream]


def test_many_answers_at_a_time_are_those_of_each_alone(engine):
    alone = [list(engine.generate(prompt, GREEDY)) for prompt in PROMPTS]

    async def test(running):
        streams = [running.submit(prompt, GREEDY) for prompt in PROMPTS]
        assert running.unfinished == len(PROMPTS)
        assert await asyncio.gather(*map(ids_of, streams)) == alone
        assert [stream.token_ids for stream in streams] == alone
        assert {stream.finish_reason for stream in streams} == {"length"}
        await running.drain()

    serve(test, engine)
    assert engine.load.pages_used == 0


def test_tokens_come_while_the_answer_is_being_made(engine):
    async def test(running):
        stream = running.submit(PROMPTS[0], LONG)
        assert await anext(stream) == stream.token_ids[0]
        assert stream.finish_reason is None
        assert running.unfinished == 1
        stream.close()

    serve(test, engine)


def test_logprobs_and_timing_come_with_the_tokens(engine):
    async def test(running):
        stream = running.submit(PROMPTS[0], dataclasses.replace(GREEDY, logprobs=2))
        ids = await ids_of(stream)
        assert [entry.token_id for entry in stream.logprobs] == ids
        assert stream.timing.new_tokens == 8

    serve(test, engine)


def test_bad_requests_are_refused_at_once_and_harm_nobody(engine):
    async def test(running):
        good = running.submit(PROMPTS[0], GREEDY)
        with pytest.raises(RequestError):
            running.submit([], GREEDY)
        with pytest.raises(CapacityError):
            running.submit([1] * 3000, GREEDY)
        assert len(await ids_of(good)) == 8

    serve(test, engine)


def test_a_full_queue_refuses(engine):
    async def test(running):
        streams = [running.submit(PROMPTS[0], LONG) for _ in range(running.most)]
        with pytest.raises(BusyError, match="try again"):
            running.submit(PROMPTS[0], GREEDY)
        for stream in streams:
            stream.close()
        await asyncio.wait_for(running._empty.wait(), 20)
        assert len(await ids_of(running.submit(PROMPTS[0], GREEDY))) == 8

    serve(test, engine, max_waiting=2)


def test_clients_that_hang_up_leave_no_page_and_no_request(engine):
    choice = random.Random(0)

    async def client(running, prompt):
        stream = running.submit(prompt, LONG)
        for _ in range(choice.randrange(6)):
            await anext(stream)
        stream.close()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stream.finish_reason is None

    async def test(running):
        await asyncio.gather(*(client(running, choice.choice(PROMPTS)) for _ in range(60)))
        await asyncio.wait_for(running._empty.wait(), 20)
        load = engine.load
        assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)

    serve(test, engine)


@pytest.mark.parametrize("error", [None, UnavailableError("too slow")])
def test_a_finished_answer_that_is_closed_half_read_is_not_called_complete(engine, error):
    async def test(running):
        stream = running.submit(PROMPTS[0], GREEDY)
        await anext(stream)
        await running.drain()
        stream.close(error)
        with pytest.raises(UnavailableError if error else StopAsyncIteration):
            await anext(stream)
        assert stream.finish_reason is None

    serve(test, engine)


def test_a_finished_answer_that_was_read_keeps_its_reason_when_closed(engine):
    async def test(running):
        stream = running.submit(PROMPTS[0], GREEDY)
        assert len([await anext(stream) for _ in range(8)]) == 8
        await running.drain()
        stream.close(UnavailableError("too slow"))
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stream.finish_reason == "length"

    serve(test, engine)


def test_waiting_for_a_token_may_time_out_and_go_on(engine):
    """What a server does to send keep-alives: the request is not lost with the waiting."""

    async def test(running):
        stream = running.submit(PROMPTS[0], GREEDY)
        for _ in range(3):
            try:
                await asyncio.wait_for(anext(stream), timeout=0)
            except TimeoutError:
                continue
        rest = await ids_of(stream)
        assert len(stream.token_ids) == 8
        assert stream.token_ids[-len(rest) :] == rest

    serve(test, engine)


def test_drain_finishes_what_runs_and_refuses_the_rest(engine):
    async def test(running):
        stream = running.submit(PROMPTS[0], GREEDY)
        draining = asyncio.create_task(running.drain())
        await asyncio.sleep(0)
        assert not running.available
        with pytest.raises(UnavailableError, match="shutting down"):
            running.submit(PROMPTS[1], GREEDY)
        await draining
        assert len(await ids_of(stream)) == 8

    serve(test, engine)


def test_closing_ends_what_runs_with_an_error(engine):
    streams = []

    async def test(running):
        streams.extend(running.submit(prompt, LONG) for prompt in PROMPTS)
        await anext(streams[0])

    serve(test, engine)

    async def read_on():
        for stream in streams:
            with pytest.raises(UnavailableError, match="shut down"):
                await ids_of(stream)

    asyncio.run(read_on())


def test_before_the_start_it_is_not_available(engine):
    async def main():
        with pytest.raises(UnavailableError):
            AsyncEngine(engine).submit(PROMPTS[0], GREEDY)

    asyncio.run(main())


def test_one_broken_request_ends_alone(engine):
    poison = 77
    weights = engine.decoder.embed_tokens.clone()
    weights[poison] = torch.nan
    engine.decoder = dataclasses.replace(engine.decoder, embed_tokens=weights)

    async def test(running):
        good, bad = running.submit(PROMPTS[0], GREEDY), running.submit([1, poison], GREEDY)
        with pytest.raises(NumericsError, match="embedding"):
            await ids_of(bad)
        assert len(await ids_of(good)) == 8

    serve(test, engine)


def test_a_step_that_fails_ends_its_requests_and_the_next_ones_run(engine, monkeypatch):
    async def test(running):
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "run", lambda *_: 1 / torch.tensor([]).max())
            streams = [running.submit(prompt, GREEDY) for prompt in PROMPTS]
            for stream in streams:
                with pytest.raises(UnavailableError, match="send the request again"):
                    await ids_of(stream)
        assert len(await ids_of(running.submit(PROMPTS[0], GREEDY))) == 8

    serve(test, engine)


def test_a_bug_in_the_thread_is_told_to_everybody(engine, monkeypatch):
    def bug():
        raise LookupError("a bug")

    async def test(running):
        stream = running.submit(PROMPTS[0], LONG)
        await anext(stream)
        monkeypatch.setattr(engine, "step", bug)
        with pytest.raises(UnavailableError, match="LookupError"):
            await ids_of(stream)
        assert not running.available
        with pytest.raises(UnavailableError, match="restart"):
            running.submit(PROMPTS[0], GREEDY)

    serve(test, engine)
