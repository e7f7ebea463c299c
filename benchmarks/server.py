"""A `nybble serve` of its own for a benchmark: a process, its address, its counts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from types import TracebackType

import httpx2
from prometheus_client.parser import text_string_to_metric_families


class Server:
    """Use as a context; `options` as on the command line. It is killed at the end."""

    def __init__(self, model: str, threads: int | None, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        fixed = [] if threads is None else ["--threads", str(threads)]
        self._arguments = [model, *fixed, "--port", str(self.port), *options]

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> float:
        """Seconds until it takes requests."""
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nybble", "serve", *self._arguments, "--quiet"]
        )
        while not self._ready():
            if self._process.poll() is not None:
                raise SystemExit("The server did not start: see what it says above.")
            time.sleep(0.02)
        return time.perf_counter() - begin

    def kill(self) -> None:
        """SIGKILL: it gets no chance to put anything in order."""
        self._process.kill()
        self._process.wait()

    def metrics(self) -> dict[str, float]:
        """{"name{labels}": value}, the labels as Prometheus writes them."""
        text = httpx2.get(f"http://127.0.0.1:{self.port}/metrics", timeout=60).text
        return {
            sample.name + "".join(f"{{{k}={v}}}" for k, v in sample.labels.items()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def _ready(self) -> bool:
        try:
            return httpx2.get(f"http://127.0.0.1:{self.port}/health").status_code == 200
        except httpx2.TransportError:
            return False
