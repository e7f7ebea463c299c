"""How fast a GPU reads a prompt depends on the numbers: a product of simpler ones costs less power.

    python benchmarks/prefill_data.py --shape qwen-72b-int4

The same kernels on three kinds of weights, with the GPU's clock and power meanwhile. The first is
what every other benchmark here uses.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from dataclasses import replace
from typing import Annotated

import torch
import typer

from nybble.bench.shapes import Draw, random_decoder, shape
from nybble.bench.speed import Plan, prefill_seconds
from nybble.kernels import select_backend
from nybble.kernels.matrix import QuantMatrix


class LikeReal(Draw):
    """Codes as GPTQ leaves them: normal, with the standard deviation of a demo in groups of 64."""

    def matrix(self, inputs: int, outputs: int) -> QuantMatrix:
        matrix = super().matrix(inputs, outputs)
        for words in matrix.words.split(512):
            codes = torch.empty(8, *words.shape, device=words.device)
            codes = codes.normal_(8, 3.2, generator=self.random).round_().clamp_(0, 15).int()
            words.copy_(sum(codes[i] << 4 * i for i in range(8)))
        return replace(matrix, scales=matrix.scales * (4.6 / 3.2))


class LikeDummy(Draw):
    """As a loader of dummy weights fills them: numbers within 1e-3, integers zero."""

    def table(self, rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return super().table(rows, columns).uniform_(-1e-3, 1e-3, generator=self.random)

    def norm(self, size: int) -> torch.Tensor:
        return self.table(1, size)[0].to(self.backend.dtype)

    def matrix(self, inputs: int, outputs: int) -> QuantMatrix:
        matrix = super().matrix(inputs, outputs)
        matrix.words.zero_()
        return replace(matrix, scales=self.table(*matrix.scales.shape))


def main(
    name: Annotated[str, typer.Option("--shape")] = "qwen-72b-int4",
    tokens: int = 6144,
    repeats: int = 5,
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs an NVIDIA GPU.")
    config = shape(name)
    backend = select_backend(torch.device("cuda", 0), dtype=torch.float16)
    print("| weights | tokens/s, median | least to most | clock (MHz) | power (W) |")
    print("|---|---|---|---|---|")
    for kind in (Draw, LikeReal, LikeDummy):
        decoder = random_decoder(config, backend, values=kind)
        with Watch() as watch:
            seconds = prefill_seconds(decoder, Plan(tokens, kv="float16"), repeats)
        rates = sorted(tokens / each for each in seconds)
        clock, power = (statistics.mean(each) for each in zip(*watch.samples, strict=True))
        print(
            f"| {kind.__name__} | {statistics.median(rates):,.0f} | {rates[0]:,.0f} to "
            f"{rates[-1]:,.0f} | {clock:,.0f} | {power:,.0f} |",
            flush=True,
        )
        del decoder
        torch.cuda.empty_cache()


class Watch:
    """Clock and power, as the driver tells them ten times a second."""

    samples: list[tuple[float, float]]

    def __enter__(self) -> Watch:
        self.samples, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        query = "--query-gpu=clocks.sm,power.draw.instant"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0"]
        while not self._stop.is_set():
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            clock, power = (float(part) for part in answer.split(","))
            self.samples.append((clock, power))
            time.sleep(0.1)


if __name__ == "__main__":
    typer.run(main)
