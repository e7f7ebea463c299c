"""Many clients at a time, and clients that leave: nothing may stay behind."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from random import Random

import httpx2
import pytest
import toy
from prometheus_client.parser import text_string_to_metric_families
from serving import serving, wait_for

from nybble import LLM, SamplingParams
from nybble.bench.load import Load, Target
from nybble.bench.serve import summarise
from nybble.bench.workload import fixed, take

AT_REST = {
    "nybble_requests_running": 0,
    "nybble_requests_waiting": 0,
    "nybble_requests_in_progress": 0,
    "nybble_kv_pages{'state': 'used'}": 0,
}


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """Its context is so long that whoever is not stopped answers for minutes."""
    folder = toy.write_llama(tmp_path_factory.mktemp("toy"), max_position_embeddings=2**15)
    llm = LLM(folder, dtype="float32", threads=1, max_running=32)
    with serving(llm) as running:
        yield running


def counts(server):
    """{"name{labels}": value} of /metrics."""
    with server.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name + (str(sample.labels) if sample.labels else ""): sample.value
        for family in families
        for sample in family.samples
    }


def body(number, **more):
    """A chat whose first page of the cache is everybody's."""
    content = f"{'abcdefghij ' * 8}the quick brown fox, number {number}"
    messages = [{"role": "user", "content": content}]
    return {"model": "toy", "messages": messages, "ignore_eos": True, **more}


def run_clients(server, clients):
    async def main():
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(client(http) for client in clients))

    return asyncio.run(asyncio.wait_for(main(), 120))


async def streamed(http, number, tokens):
    text, reasons = "", []
    async with http.stream(
        "POST",
        "/v1/chat/completions",
        json=body(number, stream=True, max_tokens=tokens, temperature=0),
    ) as response:
        assert response.status_code == 200
        async for event in httpx2.EventSource(response):
            if event.data == "[DONE]":
                return text, reasons
            (choice,) = json.loads(event.data)["choices"]
            text += choice["delta"].get("content") or ""
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    raise AssertionError("the stream was cut")


def test_64_streams_at_a_time_say_what_each_says_alone(busy):
    before = counts(busy)
    answers = run_clients(busy, [lambda http, i=i: streamed(http, i % 8, 24) for i in range(64)])
    llm = LLM(busy.host.service.llm.folder, dtype="float32", threads=1)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    busy.wait_until_idle()
    alone = [llm.chat(body(i)["messages"], sampling_params=greedy).text for i in range(8)]
    assert answers == [(alone[i % 8], ["length"]) for i in range(64)]
    after = counts(busy)
    for name, count in (
        ("nybble_requests_finished_total{'reason': 'length'}", 64),
        ("nybble_requests_arrived_total", 64),
        ("nybble_time_to_first_token_seconds_count", 64),
        ("nybble_inter_token_latency_seconds_count", 64 * 23),
        ("nybble_request_generated_tokens_sum", 64 * 24),
    ):
        assert after[name] - before.get(name, 0) == count, name
    assert after["nybble_prefix_cache_hit_tokens_total"] >= 0


def test_bench_serve_understands_this_server(busy):
    target = Target(f"{busy.url}/v1", "toy", ignore_eos=True)
    report = summarise({}, Load(target, take(fixed(12, 5, Random(0)), 8)).closed_loop(4))
    assert (report.finished, report.failures) == (8, {})
    assert report.new_tokens == 8 * 5
    assert report.prompt_tokens > 8 * 12
    assert report.first_token.count == 8


def test_whoever_is_turned_away_at_the_door_is_counted_too(llm):
    with serving(llm, api_key="secret", max_body=1000) as server:
        headers = {"Authorization": "Bearer secret"}
        with server.client(headers=headers) as client:
            path = "/v1/chat/completions"
            assert client.post(path, content=b" " * 2000).status_code == 413
            assert client.post(path, content=b"{").status_code == 400
            assert client.post(path, headers={"Authorization": "no"}).status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "no"}).status_code == 401
            text = client.get("/metrics").text
    for reason in ("request_too_large", "invalid_request", "invalid_api_key"):
        assert f'nybble_requests_rejected_total{{reason="{reason}"}} 1.0' in text
    assert "nybble_requests_arrived_total 3.0" in text
    assert "nybble_requests_in_progress 0.0" in text


class Leaver:
    """A client that hangs up at a moment of its own choice."""

    def __init__(self, number):
        self.number = number
        self.chance = Random(number)

    async def __call__(self, http):
        way = self.chance.choice([self.in_the_middle, self.unanswered, self.unsaid])
        await way(http)

    async def in_the_middle(self, http):
        """Of a stream, after some of its pieces; or before the first."""
        pieces = self.chance.randrange(6)
        request = body(self.number, stream=True, n=self.chance.choice([1, 1, 3]))
        async with http.stream("POST", "/v1/chat/completions", json=request) as response:
            if response.status_code == 429:
                return
            events = aiter(httpx2.EventSource(response))
            for _ in range(pieces):
                await anext(events)

    async def unanswered(self, http):
        """While the whole answer is being made."""
        answer = http.post("/v1/chat/completions", json=body(self.number))
        with suppress(TimeoutError):
            await asyncio.wait_for(answer, self.chance.random() / 5)

    async def unsaid(self, http):
        """Before the request has been sent to its end."""
        _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n")
        if self.chance.random() < 0.5:
            writer.write(b'\r\n{"model": "toy", ')
        await writer.drain()
        writer.close()
        await writer.wait_closed()


def test_200_clients_that_hang_up_leave_nothing(busy, caplog):
    busy.wait_until_idle()
    loop = busy.engine._loop
    tasks = len(asyncio.all_tasks(loop))
    before = counts(busy)
    run_clients(busy, [Leaver(number) for number in range(200)])
    busy.wait_until_idle()
    wait_for(lambda: AT_REST.items() <= counts(busy).items())
    after = counts(busy)
    aborted = "nybble_requests_finished_total{'reason': 'abort'}"
    assert after[aborted] - before.get(aborted, 0) > 50
    wait_for(lambda: len(asyncio.all_tasks(loop)) <= tasks)
    # asyncio warns of a connection that is written to after its end.
    assert [record for record in caplog.records if record.name == "asyncio"] == []
    # It serves on.
    assert run_clients(busy, [lambda http: streamed(http, 0, 5)])[0][1] == ["length"]


def test_shared_prefixes_change_no_answer(toy_folder):
    """The same questions with the cache's help and without, all at a time."""
    texts = []
    for shared in (True, False):
        llm = LLM(toy_folder, dtype="float32", threads=1)
        llm.engine.scheduler.share_prefixes = shared
        with serving(llm) as server:
            for _ in range(2):
                clients = [lambda http, i=i: streamed(http, i, 16) for i in range(6)]
                texts.append(run_clients(server, clients))
            reused = counts(server)["nybble_prefix_cache_hit_tokens_total"]
            assert (reused > 0) == shared
    assert texts[0] == texts[1] == texts[2] == texts[3]
