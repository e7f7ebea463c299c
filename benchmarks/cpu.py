"""The demo on the CPU: load time, prefill, decode, memory, beside what the memory bus allows.

    make bench-cpu                      # 2 threads
    .venv/bin/python benchmarks/cpu.py --threads 8 --json

The floor is the time to read every weight once a token at the read bandwidth measured here, in
the same run. Medians over the repetitions.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from nybble import LLM, SamplingParams

_NEW_TOKENS = 128


def main(
    model: str = "demo",
    threads: int = 2,
    repeat: int = 5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    torch.set_num_threads(threads)
    first_token = _first_token_seconds(model, threads)
    bandwidth = _read_bandwidth()
    begin = time.perf_counter()
    llm = LLM(model, threads=threads)
    rows: dict[str, Any] = {
        "model": str(llm.folder),
        "kernels": llm.backend.name,
        "threads": threads,
        "load_seconds": time.perf_counter() - begin,
        "process_to_first_token_seconds": first_token,
        "prefill_512_tokens_per_second": _median(repeat, lambda: _prefill(llm, 512)),
        "prefill_2048_tokens_per_second": _median(repeat, lambda: _prefill(llm, 2048)),
        "decode_empty_tokens_per_second": _median(repeat, lambda: _decode(llm, 4)),
        "decode_after_2000_tokens_per_second": _median(repeat, lambda: _decode(llm, 2000)),
        "read_bandwidth_gb_per_second": bandwidth / 1e9,
    }
    weights = _bytes_per_token(llm)
    rows["weight_bytes_per_token"] = weights
    rows["floor_tokens_per_second"] = bandwidth / weights
    rows["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for name, value in rows.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):40} {shown}")


def _first_token_seconds(model: str, threads: int) -> float:
    """From starting a new Python process to the first token of an answer."""
    code = (
        "from nybble import LLM, SamplingParams\n"
        f"llm = LLM({model!r}, threads={threads})\n"
        "next(iter(llm.stream('Hello', sampling_params=SamplingParams(max_tokens=4))))\n"
    )
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _read_bandwidth() -> float:
    """Bytes a second of a sum over a buffer far larger than the caches."""
    buffer = torch.ones(2**28 // 4, dtype=torch.float32)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - begin)
    return buffer.nbytes / min(times)


def _bytes_per_token(llm: LLM) -> float:
    """What one decoded token must read: the matrices of all blocks and an int8 head."""
    config, total = llm.config, 0
    for path in Path(llm.folder).glob("*.safetensors"):
        total += path.stat().st_size
    embedding = config.vocab_size * config.hidden_size
    stored = embedding * 2 * (1 if config.tied else 2)
    return total - stored + embedding * (1 + 2 / 32)


def _ids(llm: LLM, count: int) -> list[int]:
    """Any tokens do: speed does not depend on them. Never the same prefix twice."""
    return torch.randint(100, llm.config.vocab_size - 100, (count,)).tolist()


def _prefill(llm: LLM, tokens: int) -> float:
    completion = llm.generate(_ids(llm, tokens), SamplingParams(temperature=0, max_tokens=1))
    return tokens / completion.timing.prefill_seconds


def _decode(llm: LLM, context: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True)
    return llm.generate(_ids(llm, context), params).timing.decode_rate


def _median(repeat: int, measure: Any) -> float:
    return statistics.median(measure() for _ in range(repeat))


if __name__ == "__main__":
    typer.run(main)
