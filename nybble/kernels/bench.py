"""The CPU kernels on the demo's shapes, beside the memory: nybble bench kernels --device cpu."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from nybble.kernels import choose_backend
from nybble.kernels.backend import (
    KV_DTYPES,
    Backend,
    Batch,
    KVLayer,
    LinearFn,
    scales_shape,
    stored_width,
)
from nybble.kernels.matrix import QuantMatrix

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
GROUP_SIZE, PAGE_SIZE, REPEATS = 32, 64, 9
Row = dict[str, float | int | str]
ATTENTION = (  # (sequences, new tokens of each, keys of each)
    (1, 1, 128),
    (1, 1, 512),
    (1, 1, 2048),
    (16, 1, 512),
    (1, 512, 512),
    (1, 2048, 2048),
)
SHAPES = (  # (K, N) of one layer
    (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    (HEADS * HEAD_DIM, HIDDEN),
    (HIDDEN, 2 * WIDTH),
    (WIDTH, HIDDEN),
)


def times(run: Callable[[], object]) -> list[float]:
    """Seconds of several runs, after one to warm up."""
    run()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def seconds(run: Callable[[], object]) -> float:
    return median(times(run))


def read_bandwidth() -> float:
    """Bytes a second of summing 512 MB, more than any cache holds: the best run, for a ceiling."""
    data = torch.ones(2**27)
    return data.numel() * 4 / min(times(data.sum))


def random_matrix(inputs: int, outputs: int, bits: int = 4) -> QuantMatrix:
    words = torch.randint(-(2**31), 2**31, (inputs * bits // 32, outputs), dtype=torch.int64)
    scales = torch.rand(inputs // GROUP_SIZE, outputs).to(torch.float16)
    return QuantMatrix(bits, GROUP_SIZE, inputs, words.to(torch.int32), scales)


def product_rows(backend: Backend, bandwidth: float) -> Iterator[Row]:
    """All matrices of a token, layer after layer: the weights come from memory, as in a step."""
    matrices = [random_matrix(*shape) for _ in range(LAYERS) for shape in SHAPES]
    head = random_matrix(HIDDEN, VOCAB, bits=8)
    linears = [backend.quant_linear(matrix, None) for matrix in matrices]
    size = sum(matrix.nbytes for matrix in matrices) + head.nbytes
    last = backend.quant_linear(head, None)
    work = 2 * sum(matrix.in_features * matrix.out_features for matrix in matrices)
    for tokens in (1, 2, 4, 8, 64, 512):
        inputs = [torch.randn(tokens, matrix.in_features) for matrix in matrices]
        taken = seconds(lambda xs=inputs: run_all(linears, xs, last))  # type: ignore[misc]
        rate = size / taken
        print(
            f"products, {tokens:3} tokens {taken * 1e3:8.2f} ms {tokens / taken:7.0f} tokens/s "
            f"{rate / 1e9:6.1f} GB/s, {rate / bandwidth:4.0%} of the ceiling, "
            f"{tokens * work / taken / 1e9:6.0f} GOP/s"
        )
        yield {
            "operation": "products",
            "tokens": tokens,
            "seconds": taken,
            "bytes_per_s": rate,
            "of_ceiling": rate / bandwidth,
            "op_per_s": tokens * work / taken,
        }


def run_all(linears: list[LinearFn], inputs: list[torch.Tensor], last: LinearFn) -> None:
    for linear, x in zip(linears, inputs, strict=True):
        linear(x)
    last(inputs[0][-1:])


def paged_layer(kind: str, pages: int) -> KVLayer:
    """Random bytes, whatever they mean; scales of 1."""
    slots = torch.Size((pages, KV_HEADS, PAGE_SIZE))
    width = stored_width(kind, HEAD_DIM)
    codes = torch.randn(2, *slots, width).mul_(9).to(KV_DTYPES[kind])
    shape = scales_shape(kind, slots, HEAD_DIM)
    scales = None if shape is None else torch.ones(shape, dtype=torch.float16)
    return KVLayer(kind, codes[0], codes[1], scales, scales)


def even_batch(sequences: int, tokens: int, length: int) -> Batch:
    """Sequences of one length in pages of their own, `tokens` of each new."""
    count = -(-length // PAGE_SIZE)

    def integers(values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.int32)

    pages = integers(torch.arange(sequences * count)).view(sequences, count)
    positions = torch.arange(length - tokens, length)
    slots = pages[:, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    starts = integers(torch.arange(sequences + 1) * tokens)
    lengths = integers(torch.full((sequences,), length))
    return Batch(integers(slots.flatten()), pages, starts, lengths, tokens, length)


def attention_rows(backend: Backend) -> Iterator[Row]:
    for kind in ("float16", "int8", "int6", "int4"):
        for sequences, tokens, length in ATTENTION:
            batch = even_batch(sequences, tokens, length)
            layer = paged_layer(kind, batch.pages.numel())
            q = torch.randn(sequences * tokens, HEADS, HEAD_DIM)
            taken = seconds(lambda q=q, at=layer, b=batch: backend.attention(q, at, b, 0.125))  # type: ignore[misc]
            print(
                f"attention, {kind:7} {sequences:2} x {tokens:4} queries over {length:4} keys "
                f"{taken * 1e6:9.0f} us a layer"
            )
            yield {
                "operation": f"attention {kind}",
                "sequences": sequences,
                "new": tokens,
                "keys": length,
                "seconds": taken,
            }


def run() -> list[Row]:
    """Prints and returns the time of every kernel."""
    backend, choice = choose_backend("cpu")
    print(f"{choice.kernel} kernels, {torch.get_num_threads()} threads", *choice.refused, sep="\n")
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    ceiling: Row = {"operation": "ceiling", "bytes_per_s": bandwidth}
    return [ceiling, *product_rows(backend, bandwidth), *attention_rows(backend)]
