"""Times the matrix kernels in the shapes of Qwen-72B-Chat-Int4: python -m nybble.kernels.cuda.bench

Every shape has ten sets of random weights that are used in turn, so that nothing comes from the
L2 cache; launches are replayed from a CUDA graph. GB/s counts weights, scales and zero points
once per product; the ceiling is a read-only kernel, measured in the same run. From 17 tokens on a
product includes the arrangement of its inputs, which most products of a model find done.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nybble.kernels.cuda.launch import kernel
from nybble.kernels.cuda.linear import CudaLinear
from nybble.kernels.cuda.plans import Plan, fitted
from nybble.kernels.cuda.samples import random_matrix

# name: inputs, outputs, gate and up in one matrix
SHAPES = {
    "qkv": (8192, 24576, False),
    "attn_out": (8192, 8192, False),
    "gate_up": (8192, 49152, True),
    "down": (24576, 8192, False),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SETS = 10
Row = dict[str, float | int | str]


class _ReadArguments(ctypes.Structure):
    _fields_ = (("source", ctypes.c_void_p), ("to", ctypes.c_void_p), ("count", ctypes.c_long))


def seconds(work: Callable[[], object], *, replays: int = 15) -> float:
    """Median time of one replay of `work`, captured in a CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        work()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    for i in range(replays + 2):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def read_ceiling(device: torch.device, size: int = 4 << 30) -> float:
    """Bytes a second of a kernel that only reads."""
    data = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    run = kernel("read.cu", "read_only", (), device)
    blocks = torch.cuda.get_device_properties(device).multi_processor_count * 4
    arguments = _ReadArguments(data.data_ptr(), sink.data_ptr(), size // 16)
    return size / seconds(lambda: run.launch((blocks, 1), 512, arguments, dependent=False))


def make_sets(
    shape: str, *, dtype: torch.dtype, random: torch.Generator, bits: int = 4
) -> list[CudaLinear]:
    inputs, outputs, paired = SHAPES[shape]
    matrices = (random_matrix(inputs, outputs, bits=bits, random=random) for _ in range(SETS))
    return [CudaLinear(matrix, dtype=dtype, paired=paired) for matrix in matrices]


def with_options(
    linears: Sequence[CudaLinear], *, plan: Plan | None = None, dependent: bool = True
) -> list[CudaLinear]:
    """The same weights under other settings."""
    return [
        CudaLinear(
            one.matrix,
            dtype=one.dtype,
            plan=None if plan is None else fitted(plan, one.layout),
            dependent=dependent,
        )
        for one in linears
    ]


def product_seconds(linears: Sequence[CudaLinear], tokens: int) -> float:
    """Mean time of one product, over all weight sets."""
    first = linears[0]
    x = torch.randn(tokens, first.matrix.in_features, device=first.device).to(first.dtype)
    return seconds(lambda: [one(x) for one in linears]) / len(linears)


def block_seconds(sets: dict[str, list[CudaLinear]], tokens: int) -> float:
    """Mean time of the four products of one block, in their order, over all weight sets."""
    order = [sets[name][i] for i in range(SETS) for name in SHAPES]
    xs = {
        k: torch.randn(tokens, k, device=order[0].device).to(order[0].dtype)
        for k in {one.matrix.in_features for one in order}
    }
    return seconds(lambda: [one(xs[one.matrix.in_features]) for one in order]) / SETS


def host_seconds(linear: CudaLinear, calls: int = 2000) -> float:
    """Host time of one eager call for one token, while the GPU is behind."""
    x = torch.randn(1, linear.matrix.in_features, device=linear.device).to(linear.dtype)
    linear(x)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        linear(x)
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken / calls


def run(
    batches: Sequence[int], dtype: torch.dtype, dependent: bool = True, bits: int = 4
) -> list[Row]:
    """Prints and returns the time of every product, and of the four of one block in a row."""
    device = torch.device("cuda", torch.cuda.current_device())
    random = torch.Generator(device).manual_seed(0)
    ceiling = read_ceiling(device)
    print(
        f"{torch.cuda.get_device_name(device)}, {dtype}, {bits} bits: "
        f"read ceiling {ceiling / 1e9:.0f} GB/s"
    )
    sets = {
        name: with_options(
            make_sets(name, dtype=dtype, random=random, bits=bits), dependent=dependent
        )
        for name in SHAPES
    }
    host = host_seconds(CudaLinear(random_matrix(256, 256, random=random), dtype=dtype))
    print(f"host time of an eager call: {host * 1e6:.1f} us")
    rows: list[Row] = [{"shape": "ceiling", "bytes_per_s": ceiling, "host_seconds": host}]
    for tokens in batches:
        for name, linears in sets.items():
            taken = product_seconds(linears, tokens)
            rows.append(_row(name, tokens, taken, linears, ceiling))
        everything = [one for linears in sets.values() for one in linears]
        rows.append(_row("block", tokens, block_seconds(sets, tokens), everything, ceiling))
    return rows


def _row(
    name: str, tokens: int, taken: float, linears: Sequence[CudaLinear], ceiling: float
) -> Row:
    size = sum(one.matrix.nbytes for one in linears) / SETS
    weights = sum(one.matrix.in_features * one.matrix.out_features for one in linears) / SETS
    operations = 2 * tokens * weights
    rate = size / taken
    print(
        f"{name:9} M={tokens:<5} {taken * 1e6:9.1f} us {rate / 1e9:7.0f} GB/s "
        f"{rate / ceiling:6.1%} of the ceiling {operations / taken / 1e12:7.1f} TFLOP/s"
    )
    return {
        "shape": name,
        "bits": linears[0].matrix.bits,
        "tokens": tokens,
        "seconds": taken,
        "bytes_per_s": rate,
        "of_ceiling": rate / ceiling,
        "flop_per_s": operations / taken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--no-dependent", action="store_true", help="no dependent launch")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    rows = run(options.batches, dtype, not options.no_dependent, options.bits)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
