"""Many requests at a time on a GPU, on random weights in the shapes of a model.

    python benchmarks/batch_gpu.py --shape qwen-72b-int4

Requests come at once, through the asyncio engine. The last column is what a step takes beyond its
decode graph: the scheduler, the sampler, Python and the copies between.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import pairwise
from typing import Annotated

import torch
import typer

from nybble import SamplingParams
from nybble.bench.shapes import random_decoder, shape
from nybble.engine.engine import Engine
from nybble.engine.loop import AsyncEngine
from nybble.kernels import select_backend

_HEADER = (
    "| requests | prompts | tokens/s | first token, median (ms) | gap, median / 99 % (ms) "
    "| a step (ms) | its graph (ms) | the host (ms) |\n|---|---|---|---|---|---|---|---|"
)


def main(
    name: Annotated[str, typer.Option("--shape")] = "qwen-72b-int4",
    requests: Annotated[list[int] | None, typer.Option()] = None,
    prompt: int = 128,
    new_tokens: int = 128,
    long_prompt: Annotated[int, typer.Option(help="Of one request in the last row.")] = 6000,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs an NVIDIA GPU.")
    device = torch.device("cuda", torch.cuda.current_device())
    config = shape(name)
    engine = Engine(
        random_decoder(config, select_backend(device, dtype=torch.float16)),
        vocab_size=config.vocab_size,
        eos_ids=(),
        max_context=8192,
        kv_dtype="float16",
        prefill_chunk=2048,
        cache_tokens=12_000,
    )
    print(_HEADER)
    counts = requests or [1, 4, 8, 16]
    for count in counts:
        measure(engine, [prompt] * count, new_tokens)
    measure(engine, [long_prompt] + [prompt] * (max(counts) // 2), new_tokens)


def measure(engine: Engine, lengths: list[int], new_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=new_tokens)
    asyncio.run(serve(engine, lengths, params))  # compiles, captures graphs
    steps = engine.counters.steps
    begin = time.perf_counter()
    firsts, gaps = asyncio.run(serve(engine, lengths, params))
    seconds, steps = time.perf_counter() - begin, engine.counters.steps - steps
    median = statistics.median(gaps) * 1e3
    graph = graph_seconds(engine, len(lengths)) * 1e3
    prompts = " + ".join(f"{lengths.count(n)} x {n}" for n in sorted(set(lengths)))
    print(
        f"| {len(lengths)} | {prompts} | {len(lengths) * new_tokens / seconds:,.0f} "
        f"| {statistics.median(firsts) * 1e3:,.0f} "
        f"| {median:.2f} / {sorted(gaps)[len(gaps) * 99 // 100] * 1e3:.2f} "
        f"| {seconds / steps * 1e3:.2f} | {graph:.2f} | {median - graph:.2f} |",
        flush=True,
    )


@torch.inference_mode()
def graph_seconds(engine: Engine, sequences: int) -> float:
    """One replay of the graph that decoded so many sequences last, alone on the GPU."""
    graphs = engine._runner._graphs
    fitting = [g for g in graphs._graphs.values() if len(g.ids) >= sequences] if graphs else []
    graph = min(fitting, key=lambda g: (len(g.ids), -g.max_length))
    lengths = graph.lengths.clone()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(20):
        graph.lengths.copy_(lengths)
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 20


async def serve(
    engine: Engine, lengths: list[int], params: SamplingParams
) -> tuple[list[float], list[float]]:
    """Seconds to each first token, and between the tokens of each answer."""
    vocab = engine.decoder.config.vocab_size
    prompts = [torch.randint(0, vocab, (length,)).tolist() for length in lengths]
    async with AsyncEngine(engine) as running:
        begin = time.perf_counter()
        times = await asyncio.gather(*(answer(running, ids, params) for ids in prompts))
    gaps = [b - a for stamps in times for a, b in pairwise(stamps)]
    return [stamps[0] - begin for stamps in times], gaps


async def answer(engine: AsyncEngine, ids: list[int], params: SamplingParams) -> list[float]:
    return [time.perf_counter() async for _ in engine.submit(ids, params)]


if __name__ == "__main__":
    typer.run(main)
