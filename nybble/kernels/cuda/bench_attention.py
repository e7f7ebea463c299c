"""Times attention in the shape of Qwen-72B-Chat: python -m nybble.kernels.cuda.bench_attention

64 heads of 128, each with its own keys and values. Caches are used in turn, so that nothing comes
from the L2 cache, and launches are replayed from a CUDA graph. GB/s counts keys, values and their
scales once; the ceiling is a read-only kernel, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nybble.kernels import open_pages
from nybble.kernels.backend import (
    KV_DTYPES,
    Batch,
    KVLayer,
    OpenStep,
    scales_shape,
    stored_width,
)
from nybble.kernels.cuda.attention import KINDS, PagedAttention
from nybble.kernels.cuda.backend import CudaBackend
from nybble.kernels.cuda.bench import read_ceiling, seconds
from nybble.kernels.cuda.rows import RowKernels

HEADS, HEAD_DIM, HIDDEN, WIDTH, VOCAB, PAGE = 64, 128, 8192, 24576, 152064, 64
CONTEXTS = (128, 1024, 6144, 14336, 30720)
LEAST_BYTES = 400 << 20  # of caches used in turn: several times an L2 cache
Row = dict[str, float | int | str]


def random_layers(kind: str, pages: int, device: torch.device) -> list[KVLayer]:
    """As many caches as it takes to leave the L2 cache behind."""
    slots = torch.Size((pages, HEADS, PAGE))
    width = stored_width(kind, HEAD_DIM)
    scales = scales_shape(kind, slots, HEAD_DIM)

    def codes() -> torch.Tensor:
        dtype = KV_DTYPES[kind]
        if dtype.is_floating_point:
            return torch.randn(*slots, width, dtype=dtype, device=device)
        low, high = (-127, 128) if kind == "int8" else (0, 256)
        return torch.randint(low, high, (*slots, width), dtype=dtype, device=device)

    def steps() -> torch.Tensor | None:
        return None if scales is None else torch.rand(scales, device=device).half() * 0.01

    first = KVLayer(kind, codes(), codes(), steps(), steps())
    more = range(max(1, LEAST_BYTES // layer_bytes(first)))
    return [first, *(KVLayer(kind, codes(), codes(), steps(), steps()) for _ in more)]


def layer_bytes(layer: KVLayer) -> int:
    parts = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    return sum(part.nbytes for part in parts if part is not None)


def batch_of(sequences: int, new: int, length: int, device: torch.device) -> Batch:
    """Sequences of one length, their pages in a random order."""
    count = -(-length // PAGE)
    pages = torch.randperm(sequences * count).view(sequences, count)
    position = torch.arange(length - new, length)
    slots = pages[:, position // PAGE] * PAGE + position % PAGE
    return Batch(
        slots=slots.flatten().int().to(device),
        pages=pages.int().to(device),
        starts=(torch.arange(sequences + 1) * new).int().to(device),
        lengths=torch.full((sequences,), length, dtype=torch.int32, device=device),
        max_query=new,
        max_length=length,
    )


def decode_row(
    attention: PagedAttention, kind: str, sequences: int, length: int, ceiling: float
) -> Row:
    device = attention.device
    batch = batch_of(sequences, 1, length, device)
    layers = random_layers(kind, batch.pages.numel(), device)
    q = torch.randn(sequences, HEADS, HEAD_DIM, device=device).to(attention.dtype)
    taken = seconds(lambda: [attention(q, layer, batch, 0.09) for layer in layers]) / len(layers)
    rate = layer_bytes(layers[0]) * length / (-(-length // PAGE) * PAGE) / taken
    print(
        f"decode {kind:9} {sequences:3} x {length:6} keys {taken * 1e6:8.1f} us "
        f"{rate / 1e9:6.0f} GB/s {rate / ceiling:6.1%} of the ceiling",
        flush=True,
    )
    return {
        "operation": "decode",
        "kind": kind,
        "sequences": sequences,
        "keys": length,
        "seconds": taken,
        "bytes_per_s": rate,
        "of_ceiling": rate / ceiling,
    }


def prefill_row(attention: PagedAttention, kind: str, new: int, length: int) -> Row:
    device = attention.device
    batch = batch_of(1, new, length, device)
    layer = random_layers(kind, batch.pages.numel(), device)[0]
    q = torch.randn(new, HEADS, HEAD_DIM, device=device).to(attention.dtype)
    taken = seconds(lambda: attention(q, layer, batch, 0.09), replays=5)
    rate = _operations(new, length) / taken
    print(f"prefill {kind:9} {new} of {length} {taken * 1e3:7.2f} ms {rate / 1e12:5.0f} TFLOP/s")
    return {
        "operation": "prefill",
        "kind": kind,
        "new": new,
        "keys": length,
        "seconds": taken,
        "flop_per_s": rate,
    }


def open_pages_rows(backend: CudaBackend, sequences: int, new: int, length: int) -> Iterator[Row]:
    """An int4 cache's writes and attention: the codes alone, then as it runs, with open pages.

    new: 1, or whole pages, as is what stands before them.
    """
    device = backend.device
    batch = batch_of(sequences, new, length, device)
    if new == 1:
        open_batch = batch_of(sequences, 1, (length - 1) % PAGE + 1, device)
    else:
        open_batch = batch_of(sequences * new // PAGE, PAGE, PAGE, device)
    batch = replace(batch, open_step=OpenStep(open_batch))
    shape = (2, open_batch.pages.numel(), HEADS, PAGE, HEAD_DIM)

    def seats() -> KVLayer:
        return KVLayer("float16", *torch.randn(shape, device=device, dtype=torch.float16))

    layers = random_layers("int4", batch.pages.numel(), device)
    layers = [replace(layer, seats=seats()) for layer in layers[: None if new == 1 else 1]]
    tokens = sequences * new
    qkv = torch.randn(tokens, 3 * HEADS, HEAD_DIM, device=device).to(backend.dtype)
    q, k, v = torch.split(qkv, HEADS, dim=1)
    cos, sin = torch.rand(2, tokens, HEAD_DIM // 2, device=device)

    def codes_alone(layer: KVLayer) -> object:
        turned = backend.rope_store(q, k, v, cos, sin, layer, batch)
        return backend.attention(turned, layer, batch, 0.09)

    def as_it_runs(layer: KVLayer) -> object:
        return open_pages.attention(backend, (q, k, v), (cos, sin), layer, batch, 0.09)

    for name, one in (("codes alone", codes_alone), ("open pages", as_it_runs)):
        taken = seconds(partial(_each, one, layers), replays=5) / len(layers)
        print(f"int4 {name:11} {sequences:3} x {new} of {length} {taken * 1e6:8.1f} us", flush=True)
        yield {
            "operation": f"step, {name}",
            "kind": "int4",
            "sequences": sequences,
            "new": new,
            "keys": length,
            "seconds": taken,
        }


def _each(run: Callable[[KVLayer], object], layers: Sequence[KVLayer]) -> None:
    for layer in layers:
        run(layer)


def sdpa_rows(tokens: int, device: torch.device) -> Iterator[Row]:
    """torch's own kernels on contiguous fp16 tensors, without pages: what else there is."""
    q, k, v = torch.randn(3, 1, HEADS, tokens, HEAD_DIM, device=device, dtype=torch.float16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    backends = torch.nn.attention.SDPBackend
    for backend in (backends.FLASH_ATTENTION, backends.CUDNN_ATTENTION):
        with torch.nn.attention.sdpa_kernel(backend):
            taken = seconds(lambda: sdpa(q, k, v, is_causal=True), replays=5)
        rate = _operations(tokens, tokens) / taken
        print(f"torch {backend.name:16} {taken * 1e3:7.2f} ms {rate / 1e12:5.0f} TFLOP/s")
        yield {"operation": backend.name, "new": tokens, "seconds": taken, "flop_per_s": rate}


def _operations(new: int, length: int) -> float:
    """Multiplications and additions of the pairs that the causal mask leaves."""
    pairs = new * length - new * (new - 1) / 2
    return 4.0 * HEADS * HEAD_DIM * pairs


def small_rows(device: torch.device) -> Iterator[Row]:
    """The operations between the products, and the head, at one token and at many."""
    rows, attention = RowKernels(device, torch.float16), PagedAttention(device, torch.float16)
    half = partial(torch.randn, device=device, dtype=torch.float16)
    weight, head = half(HIDDEN), half(VOCAB, HIDDEN)
    for tokens in (1, 16, 2048):
        x, wide = half(tokens, HIDDEN), half(tokens, 2 * WIDTH)
        q, k, v = torch.split(half(tokens, 3 * HEADS, HEAD_DIM), HEADS, dim=1)
        cos, sin = torch.rand(2, tokens, HEAD_DIM // 2, device=device)
        batch = batch_of(1, tokens, tokens, device)
        work: dict[str, Callable[[], object]] = {
            "rms_norm": partial(rows.rms_norm, x, weight, 1e-6),
            "silu_mul": partial(rows.silu_mul, wide),
            "head": partial(torch.nn.functional.linear, x, head),
        }
        for kind in KINDS:
            layer = random_layers(kind, batch.pages.numel(), device)[0]
            work[f"rope_store {kind}"] = partial(
                attention.rope_store, q, k, v, cos, sin, layer, batch
            )
        for name, run in work.items():
            repeats = 2 if name == "head" else 20
            taken = seconds(partial(_repeat, run, repeats)) / repeats
            print(f"{name:20} {tokens:5} tokens {taken * 1e6:8.2f} us", flush=True)
            yield {"operation": name, "tokens": tokens, "seconds": taken}


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()


def run(contexts: Sequence[int]) -> list[Row]:
    device = torch.device("cuda", torch.cuda.current_device())
    ceiling = read_ceiling(device)
    print(f"{torch.cuda.get_device_name(device)}: read ceiling {ceiling / 1e9:.0f} GB/s")
    rows: list[Row] = [{"operation": "ceiling", "bytes_per_s": ceiling}]
    attention = PagedAttention(device, torch.float16)
    for kind in ("float16", "int8", "int6", "int4"):
        rows += [decode_row(attention, kind, 1, length, ceiling) for length in contexts]
        rows.append(decode_row(attention, kind, 16, 1024, ceiling))
        rows += [
            prefill_row(attention, kind, 6144, 6144),
            prefill_row(attention, kind, 2048, 14336),
        ]
    backend = CudaBackend(device)
    for length in contexts:
        rows += open_pages_rows(backend, 1, 1, length)
    rows += open_pages_rows(backend, 16, 1, 1024)
    for new, length in ((6144, 6144), (2048, 14336)):
        rows += open_pages_rows(backend, 1, new, length)
    return [*rows, *sdpa_rows(6144, device), *small_rows(device)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows = run(options.contexts)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
