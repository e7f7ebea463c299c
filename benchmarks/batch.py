"""Many questions at a time: tokens a second and waiting times through the asyncio engine.

    .venv/bin/python benchmarks/batch.py                     # the demo, 2 threads
    .venv/bin/python benchmarks/batch.py --streams 1 --streams 8 --temperature 0

Every question comes at once and is answered with as many tokens as the others'. The first token
counts from the arrival; the gap is that between two tokens of a stream.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import pairwise
from typing import Annotated

import typer

from nybble import LLM, SamplingParams
from nybble.engine.loop import AsyncEngine

_THINGS = (
    "bread rivers chess glass whales paper violins the_moon tea bridges bees snow maps clocks "
    "salt trains wool stars gardens ink silk ships copper letters rain coffee mountains kites"
)
_QUESTIONS = ("Tell me about", "What should a child know about", "Write a story about")


def main(
    model: str = "demo",
    threads: int = 2,
    streams: Annotated[list[int] | None, typer.Option()] = None,
    new_tokens: int = 96,
    temperature: float = 0.8,
    repeat: int = 3,
) -> None:
    llm = LLM(model, threads=threads)
    params = SamplingParams(
        temperature=temperature, top_p=0.9, seed=1, max_tokens=new_tokens, ignore_eos=True
    )
    print("| streams | tokens/s | first token, median (s) | gap, median / 99 % (ms) |")
    print("|---|---|---|---|")
    for count in streams or [1, 4, 16, 64]:
        runs = [asyncio.run(_serve(llm, params, count, turn)) for turn in range(repeat)]
        rates, firsts, gaps = zip(*runs, strict=True)
        waits = sorted(gap for run in gaps for gap in run)
        print(
            f"| {count} | {statistics.median(rates):.0f} "
            f"| {statistics.median(first for run in firsts for first in run):.2f} "
            f"| {statistics.median(waits) * 1e3:.0f} / {waits[len(waits) * 99 // 100] * 1e3:.0f} |"
        )


async def _serve(
    llm: LLM, params: SamplingParams, count: int, turn: int
) -> tuple[float, list[float], list[float]]:
    """Tokens a second, the seconds to each first token, the seconds between tokens."""
    things = [word.replace("_", " ") for word in _THINGS.split()]
    prompts = [
        llm.chat_ids(f"{_QUESTIONS[i // len(things)]} {things[i % len(things)]}, number {turn}.")
        for i in range(count)
    ]
    async with AsyncEngine(llm.engine) as engine:
        begin = time.perf_counter()
        times = await asyncio.gather(*(_answer(engine, ids, params) for ids in prompts))
        seconds = time.perf_counter() - begin
    firsts = [stamps[0] - begin for stamps in times]
    gaps = [b - a for stamps in times for a, b in pairwise(stamps)]
    return sum(map(len, times)) / seconds, firsts, gaps


async def _answer(engine: AsyncEngine, ids: list[int], params: SamplingParams) -> list[float]:
    return [time.perf_counter() async for _ in engine.submit(ids, params)]


if __name__ == "__main__":
    typer.run(main)
