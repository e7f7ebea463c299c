"""Clients that hang up, engines that break, time that runs out: nothing is left behind."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from serving import serving, wait_for

from nybble.errors import CheckpointError
from nybble.llm import LLM

CHAT = {"messages": [{"role": "user", "content": "the quick brown fox"}], "ignore_eos": True}
LONG_CHAT = {"messages": [{"role": "user", "content": "xyz " * 30}], "ignore_eos": True}


@pytest.fixture
def slow_llm(toy_folder, monkeypatch):
    """Steps of 20 ms and 16 tokens, for one request at a time."""
    llm = LLM(toy_folder, dtype="float32", threads=1, prefill_chunk=16, max_running=1)
    run = llm.engine._runner.run

    def slow(*arguments):
        time.sleep(0.02)
        return run(*arguments)

    monkeypatch.setattr(llm.engine._runner, "run", slow)
    return llm


@pytest.fixture
def slow_server(slow_llm):
    with serving(slow_llm, max_waiting=2, keep_alive_seconds=0.05) as server:
        yield server


def send(server, body):
    """A request on a socket of its own; close it to hang up."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    )
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def prefilling(server):
    running = list(server.engine.engine.scheduler.running)
    return any(0 < sequence.computed < len(sequence.tokens) - 1 for sequence in running)


def decoding(server):
    return server.engine.engine.counters.new_tokens > 2


# -- hanging up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", [prefilling, decoding])
def test_a_client_that_hangs_up_leaves_nothing(slow_server, stream, moment, n):
    body = {**(LONG_CHAT if moment is prefilling else CHAT), "stream": stream, "n": n}
    connection = send(slow_server, body)
    wait_for(lambda: moment(slow_server))
    tokens = slow_server.engine.engine.counters.new_tokens
    connection.close()
    slow_server.wait_until_idle()
    assert slow_server.engine.engine.counters.new_tokens < tokens + 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_while_it_waits_leaves_nothing(slow_server, stream):
    first = send(slow_server, CHAT)
    wait_for(lambda: decoding(slow_server))
    second = send(slow_server, {**CHAT, "stream": stream})
    wait_for(lambda: slow_server.engine.engine.load.waiting == 1)
    second.close()
    wait_for(lambda: slow_server.engine.unfinished == 1)
    assert slow_server.engine.engine.load.running == 1
    first.close()
    slow_server.wait_until_idle()


def test_a_client_that_hangs_up_in_the_middle_of_its_body(slow_server):
    with send(slow_server, CHAT) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
    slow_server.wait_until_idle()


# -- load ------------------------------------------------------------------------------------------


def test_a_full_queue_answers_429_and_takes_requests_again(slow_server):
    connections = [send(slow_server, CHAT) for _ in range(3)]
    wait_for(lambda: slow_server.engine.unfinished == 3)
    with slow_server.client() as http:
        reply = http.post("/v1/chat/completions", json=CHAT)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        for connection in connections:
            connection.close()
        slow_server.wait_until_idle()
        reply = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})
        assert reply.status_code == 200


def test_choices_are_queued_all_or_none(slow_server):
    connection = send(slow_server, CHAT)
    wait_for(lambda: slow_server.engine.unfinished == 1)
    with slow_server.client() as http:
        assert http.post("/v1/chat/completions", json={**CHAT, "n": 3}).status_code == 429
        reply = http.post("/v1/chat/completions", json={**CHAT, "n": 4})
        assert reply.status_code == 400  # more than there is room for, ever
        assert reply.json()["error"]["param"] == "n"
    wait_for(lambda: slow_server.engine.unfinished == 1)
    connection.close()
    slow_server.wait_until_idle()


def test_comments_keep_the_connection_alive_while_a_request_waits(slow_server):
    first = send(slow_server, CHAT)
    wait_for(lambda: decoding(slow_server))
    with (
        slow_server.client() as http,
        http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        assert '"role":"assistant"' in next(lines)
        assert next(line for line in lines if line) == ": keep-alive"
    first.close()
    slow_server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_is_ended(slow_llm, stream):
    with serving(slow_llm, request_seconds=0.3) as server, server.client() as http:
        reply = http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert reply.status_code == (200 if stream else 504)
        error = last_event(reply)["error"] if stream else reply.json()["error"]
        assert error["code"] == "request_timeout"
        assert "0.3 seconds" in error["message"]
        if not stream:
            assert reply.headers["x-should-retry"] == "false"
        server.wait_until_idle()


def last_event(reply):
    """The event before [DONE]."""
    *_, last, done = (line for line in reply.text.splitlines() if line.startswith("data: "))
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))


# -- what breaks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(llm, monkeypatch, stream, n):
    with serving(llm) as server, server.client() as http:
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine._runner, "run", out_of_memory)
            reply = http.post("/v1/chat/completions", json={**CHAT, "stream": stream, "n": n})
        error = last_event(reply)["error"] if stream else reply.json()["error"]
        assert error["code"] == "unavailable"
        assert reply.status_code == (200 if stream else 503)
        good = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})
        assert good.status_code == 200
        server.wait_until_idle()


def test_one_bad_prompt_of_many_ends_the_request_before_it_begins(llm):
    with serving(llm) as server, server.client() as http:
        body = {"prompt": [[5], [6], [70000]], "ignore_eos": True, "max_tokens": 200}
        before = llm.engine.counters.new_tokens
        assert http.post("/v1/completions", json=body).status_code == 400
        server.wait_until_idle()
        assert llm.engine.counters.new_tokens - before < 100


def out_of_memory(*_):
    raise MemoryError("no memory")


def test_an_engine_that_died_says_so_and_health_does_too(toy_folder, monkeypatch):
    llm = LLM(toy_folder, dtype="float32", threads=1)
    with serving(llm) as server, server.client() as http:
        monkeypatch.setattr(llm.engine, "step", lambda: {}["a bug"])
        for _ in range(2):
            reply = http.post("/v1/chat/completions", json=CHAT)
            assert reply.status_code == 503
            assert "restart the server" in reply.json()["error"]["message"]
        health = http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "broken"})


def test_a_bug_is_a_500_in_the_same_shape(llm, monkeypatch):
    with serving(llm) as server, server.client() as http:
        monkeypatch.setattr(server.host.service, "chat_ids", lambda *_: {}["a bug"])
        reply = http.post("/v1/chat/completions", json=CHAT)
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "server_error"
        assert reply.headers["x-request-id"]
        assert "Traceback" not in reply.text


@pytest.mark.parametrize("n", [1, 3])
def test_a_bug_while_an_answer_is_read_is_a_500_too(llm, monkeypatch, n):
    with serving(llm) as server, server.client() as http:
        with monkeypatch.context() as patch:
            patch.setattr("nybble.serve.answers.TextBuilder.push", lambda *_: {}["a bug"])
            reply = http.post("/v1/chat/completions", json={**CHAT, "n": n})
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "internal_error"
        server.wait_until_idle()


# -- coming and going ------------------------------------------------------------------------------


def test_while_the_model_is_loaded_requests_get_503(llm):
    loaded = threading.Event()

    def load():
        loaded.wait()
        return llm

    with serving(load, ready=False) as server, server.client() as http:
        try:
            health = http.get("/health")
            assert (health.status_code, health.json()) == (503, {"status": "loading"})
            for path in ("/v1/models", "/v1/models/toy"):
                assert http.get(path).status_code == 503
            reply = http.post("/v1/chat/completions", json=CHAT)
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
            assert "still being loaded" in reply.json()["error"]["message"]
            assert http.get("/version").status_code == 200
        finally:
            loaded.set()
        wait_for(lambda: http.get("/health").status_code == 200)
        assert http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 1}).status_code == 200


def test_a_server_that_is_stopped_while_it_loads_does_not_wait():
    """A thread of asyncio's pool would be waited for, here for ever."""
    with serving(threading.Event().wait, ready=False) as server:
        wait_for(lambda: server.host.status == "loading")
    assert server.host.status == "draining"


@pytest.mark.parametrize("kind", [CheckpointError, MemoryError, KeyError])
def test_a_model_that_cannot_be_loaded_says_so(kind, caplog):
    def load():
        raise kind("model.safetensors is cut short: fetch it again.")

    with serving(load, ready=False) as server, server.client() as http:
        wait_for(lambda: server.host.status == "failed")
        reply = http.post("/v1/chat/completions", json=CHAT)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "failed"
        assert "cut short" not in reply.text  # a path may stand in it: for the log only
        assert "cut short" in caplog.text


def test_draining_refuses_new_requests_and_ends_the_others_when_time_is_up(slow_llm):
    with serving(slow_llm, drain_seconds=0.3) as server, server.client() as http:
        with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            drained = in_loop(server, server.host.drain)
            wait_for(lambda: server.host.status == "draining")
            with server.client() as other:
                refused = other.post("/v1/chat/completions", json=CHAT)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "draining"
                assert other.get("/health").status_code == 503
            texts = [line for line in lines if line.startswith("data: ")]
        drained.result(timeout=10)
        assert texts[-1] == "data: [DONE]"
        assert "shut down" in json.loads(texts[-2].removeprefix("data: "))["error"]["message"]


def in_loop(server, work):
    import asyncio

    return asyncio.run_coroutine_threadsafe(work(), server.engine._loop)
