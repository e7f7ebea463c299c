"""What a server on this machine stands: many streams, a long prompt twice, a kill.

    .venv/bin/python benchmarks/load.py                       # the demo

Streams come all at once and have equal lengths; the ratio is that of tokens a second. Prompts are
random words, so that nothing but the template is in the cache, except where that is the point.
"""

from __future__ import annotations

import os
import statistics
import time
from random import Random
from typing import Annotated

import httpx2
import typer
from server import Server

from nybble.bench.load import Load, Target, first_model
from nybble.bench.serve import markdown, summarise
from nybble.bench.workload import fixed, take


def main(
    model: str = "demo",
    threads: int | None = None,
    streams: Annotated[list[int] | None, typer.Option()] = None,
    prompt_tokens: int = 64,
    new_tokens: int = 96,
    prefix_tokens: int = 2000,
    repeat: int = 3,
) -> None:
    print(f"Load of the machine before: {os.getloadavg()[0]:.1f}\n")
    with Server(model, threads) as server:
        target = Target(server.url, first_model(server.url, None), ignore_eos=True)
        counts = streams or [1, 4, 16, 64]
        # In turns, so that whatever else the machine does meets all of them.
        runs = [
            [_run(target, n, prompt_tokens, new_tokens, turn) for n in counts]
            for turn in range(repeat)
        ]
        for rates in runs:
            print(
                ", ".join(f"{n} streams {rate:.0f}" for n, rate in zip(counts, rates, strict=True))
            )
        best = [max(rates) for rates in zip(*runs, strict=True)]
        print("Best, tokens/s:", end=" ")
        print(
            ", ".join(
                f"{n}: {r:.0f} ({r / best[0]:.1f} x)" for n, r in zip(counts, best, strict=True)
            )
        )
        _prefix(target, prefix_tokens, repeat)
        server.kill()
        ready = server.start()
        answer = time.perf_counter()
        Load(target, take(fixed(8, 1, Random(0)), 1)).closed_loop(1)
        print(f"Killed and started: ready after {ready:.1f} s, ", end="")
        print(f"first answer {time.perf_counter() - answer:.2f} s later")
    print(f"\nLoad of the machine after: {os.getloadavg()[0]:.1f}")


def _run(target: Target, count: int, prompt: int, new: int, turn: int) -> float:
    """Tokens a second; prints the table."""
    # A few one after another where there are few at a time.
    jobs = take(fixed(prompt, new, Random(f"{count}, {turn}")), max(count, 4))
    report = summarise({"streams": count, "turn": turn}, Load(target, jobs).closed_loop(count))
    print(f"{markdown(report)}\n\nLoad of the machine: {os.getloadavg()[0]:.1f}\n")
    return report.token_rate


def _prefix(target: Target, tokens: int, repeat: int) -> None:
    """Seconds to the first token of a long prompt: new, and with another last sentence."""
    first, second = [], []
    for turn in range(repeat):
        (job,) = take(fixed(tokens, 1, Random(f"prefix {turn}")), 1)
        first.append(_first_token(target, job.messages[0]["content"] + " Why?"))
        second.append(_first_token(target, job.messages[0]["content"] + " When, and where?"))
    new, known = statistics.median(first), statistics.median(second)
    print(f"First token after {tokens} words: {new * 1e3:.0f} ms; ", end="")
    print(f"the same words again: {known * 1e3:.0f} ms, {new / known:.1f} x")


def _first_token(target: Target, text: str) -> float:
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "ignore_eos": True,
    }
    begin = time.perf_counter()
    httpx2.post(f"{target.url}/chat/completions", json=body, timeout=600).raise_for_status()
    return time.perf_counter() - begin


if __name__ == "__main__":
    typer.run(main)
