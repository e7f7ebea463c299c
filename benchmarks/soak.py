"""Hours of use in minutes: good and bad requests, and clients that leave; is memory flat?

    .venv/bin/python benchmarks/soak.py                      # the demo, 2 threads, 10 minutes

A line now and then shows what the server's /metrics says of itself; the end tells how the memory
went on after the first third, and every answer that was not the one expected. The cache is small,
so that it is soon full of prefixes and stops growing.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import httpx2
import numpy as np
import typer
from server import Server

from nybble.bench.workload import fixed, take

Client = httpx2.AsyncClient
CHAT = "/chat/completions"
REFUSED = {400, 404, 405, 413, 422, 429}


class Soak:
    """Clients that each do one thing after another, drawn by their weights."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self.url, self.model = url, model
        self.random = Random(seed)
        self.seen: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.actions: dict[Callable[[Client], Awaitable[int]], int] = {
            self.stream: 4,
            self.whole: 3,
            self.several: 1,
            self.long_prompt: 1,
            self.leave: 3,
            self.lose_patience: 2,
            self.bad: 4,
            self.huge: 1,
        }

    async def run(self, clients: int, until: float) -> None:
        limits = httpx2.Limits(max_connections=None)
        async with Client(base_url=self.url, timeout=300, limits=limits) as http:
            await asyncio.gather(*(self._client(http, until) for _ in range(clients)))

    async def _client(self, http: Client, until: float) -> None:
        while time.monotonic() < until:
            (action,) = self.random.choices([*self.actions], [*self.actions.values()])
            name = action.__name__
            expected = REFUSED if action in (self.bad, self.huge) else {0, 200, 429}
            try:
                status = await action(http)
                self.seen[f"{name} {status or 'left'}"] += 1
                if status not in expected:
                    self.wrong[f"{name}: {status}"] += 1
            except httpx2.HTTPError as error:
                self.wrong[f"{name}: {type(error).__name__}"] += 1

    def body(self, tokens: int = 40, words: int = 30, **more: Any) -> dict[str, Any]:
        (job,) = take(fixed(words, tokens, self.random), 1)
        return {"model": self.model, "messages": job.messages, "max_tokens": tokens, **more}

    # -- what clients do: each returns the status, 0 for having left ---------------------------

    async def stream(self, http: Client) -> int:
        return await self._read(http, self.body(stream=True), 10**9)

    async def leave(self, http: Client) -> int:
        await self._read(http, self.body(400, stream=True), self.random.randrange(20))
        return 0

    async def _read(self, http: Client, body: dict[str, Any], pieces: int) -> int:
        async with http.stream("POST", CHAT, json=body) as response:
            async for _ in response.aiter_lines():
                pieces -= 1
                if pieces <= 0:
                    break
            return response.status_code

    async def whole(self, http: Client) -> int:
        return (await http.post(CHAT, json=self.body())).status_code

    async def several(self, http: Client) -> int:
        body = self.body(n=3, logprobs=True, top_logprobs=5, seed=1, stop=["the"])
        return (await http.post(CHAT, json=body)).status_code

    async def long_prompt(self, http: Client) -> int:
        return (await http.post(CHAT, json=self.body(8, 1500))).status_code

    async def lose_patience(self, http: Client) -> int:
        try:
            async with asyncio.timeout(self.random.random()):
                return (await http.post(CHAT, json=self.body(400))).status_code
        except TimeoutError:
            return 0

    async def bad(self, http: Client) -> int:
        choices: list[dict[str, Any]] = [
            {"content": b"{"},
            {"content": b"\xff" * 50},
            {"json": {}},
            {"json": self.body() | {"model": "no such"}},
            {"json": self.body() | {"temperature": "hot"}},
            {"json": self.body() | {"surprise": 1}},
            {"json": self.body() | {"messages": [{"role": "user"}] * 1000}},
            {"json": self.body(words=20000)},
        ]
        return (await http.post(CHAT, **self.random.choice(choices))).status_code

    async def huge(self, http: Client) -> int:
        return (await http.post(CHAT, content=b" " * (17 << 20))).status_code


def main(
    model: str = "demo",
    threads: int = 2,
    minutes: float = 10,
    clients: int = 16,
    every: float = 20,
    seed: int = 0,
    cache_tokens: int = 16000,
) -> None:
    options = f"--served-name soaked --max-waiting 24 --cache-tokens {cache_tokens}"
    with Server(model, threads, *options.split()) as server:
        soak = Soak(server.url, "soaked", seed)
        rows = asyncio.run(_soak(soak, server, clients, minutes * 60, every))
        at_rest = _at_rest(server)
    print("\n" + ", ".join(f"{name}: {count}" for name, count in sorted(soak.seen.items())))
    print("Not as expected: " + (str(dict(soak.wrong)) if soak.wrong else "nothing"))
    settled = [row for row in rows if row[0] > minutes * 20]
    times, sizes = np.asarray(settled).T
    slope = float(np.polyfit(times, sizes, 1)[0]) * 60
    print(f"Memory after the first third: {settled[0][1]:.0f} to {settled[-1][1]:.0f} MB, ", end="")
    print(f"{slope:+.2f} MB a minute; at rest afterwards: {at_rest}")


async def _soak(
    soak: Soak, server: Server, clients: int, seconds: float, every: float
) -> list[tuple[float, float]]:
    """(seconds, resident MB), which are printed as they come."""
    begin, rows = time.monotonic(), []
    running = asyncio.create_task(soak.run(clients, begin + seconds))
    print("| s | resident MB | running | waiting | pages used / cached | requests | load |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    while not running.done():
        await asyncio.wait([running], timeout=every)
        now, seen = time.monotonic() - begin, await asyncio.to_thread(server.metrics)
        rows.append((now, seen["process_resident_memory_bytes"] / 1e6))
        used, cached = (seen[f"nybble_kv_pages{{state={state}}}"] for state in ("used", "cached"))
        print(
            f"| {now:.0f} | {rows[-1][1]:.0f} | {seen['nybble_requests_running']:.0f} "
            f"| {seen['nybble_requests_waiting']:.0f} | {used:.0f} / {cached:.0f} "
            f"| {soak.seen.total()} | {os.getloadavg()[0]:.1f} |",
            flush=True,
        )
    await running
    return rows


def _at_rest(server: Server) -> str:
    """What is left a second after the last client has gone."""
    time.sleep(1)
    seen = server.metrics()
    names = ("nybble_requests_running", "nybble_requests_waiting", "nybble_requests_in_progress")
    left = [seen[name] for name in names] + [seen["nybble_kv_pages{state=used}"]]
    return "nothing" if not any(left) else f"running, waiting, in progress, pages: {left}"


if __name__ == "__main__":
    typer.run(main)
