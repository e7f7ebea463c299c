"""A real server process that is killed, started again, and told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
import toy
from serving import wait_for

LONG = 1200  # tokens: about two seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_llama(tmp_path_factory.mktemp("toy"), max_position_embeddings=2048)


class Process:
    """`nybble serve` on a port that was free a moment ago."""

    def __init__(self, folder, port=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = f"--served-name toy --port {self.port} --dtype float32 --threads 1"
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "nybble", "serve", str(folder), *arguments.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate()

    def wait_until_ready(self):
        wait_for(self.ready, 60)
        return self

    def ready(self):
        assert self.popen.poll() is None
        try:
            return httpx2.get(f"{self.url}/health").status_code == 200
        except httpx2.TransportError:
            return False

    def post(self, tokens=3, **more):
        return httpx2.post(f"{self.url}/v1/completions", json=body(tokens, **more), timeout=30)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def body(tokens, **more):
    return {"model": "toy", "prompt": "the quick", "max_tokens": tokens, "ignore_eos": True, **more}


class Stream(threading.Thread):
    """Reads one long answer; `began` when its first piece has come."""

    def __init__(self, url):
        super().__init__()
        self.url, self.began = url, threading.Event()
        self.events, self.error = [], None
        self.start()

    def run(self):
        request = body(LONG, stream=True)
        try:
            with httpx2.stream(
                "POST", f"{self.url}/v1/completions", json=request, timeout=60
            ) as response:
                for event in httpx2.EventSource(response):
                    self.events.append(event.data)
                    self.began.set()
        except httpx2.TransportError as error:
            self.error = error

    def wait_until_begun(self):
        assert self.began.wait(30)
        return self


def test_sigterm_lets_streams_finish_and_refuses_new_ones(folder):
    with Process(folder) as server:
        server.wait_until_ready()
        streams = [Stream(server.url).wait_until_begun() for _ in range(3)]
        server.popen.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx2.get(f"{server.url}/health").status_code == 503)
        refused = server.post()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        for stream in streams:
            stream.join(60)
            assert stream.error is None
            assert stream.events[-1] == "[DONE]"
            reasons = [json.loads(e)["choices"][0]["finish_reason"] for e in stream.events[:-1]]
            assert reasons[-1] == "length"
        assert server.popen.wait(20) == 0
        assert "Traceback" not in server.popen.stderr.read()


def test_a_second_signal_does_not_wait(folder):
    with Process(folder) as server:
        server.wait_until_ready()
        stream = Stream(server.url).wait_until_begun()
        server.popen.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx2.get(f"{server.url}/health").status_code == 503)
        server.popen.send_signal(signal.SIGTERM)
        server.popen.wait(20)
        stream.join(20)
        assert "[DONE]" not in stream.events


def test_killed_and_started_again_it_answers_within_seconds(folder):
    with Process(folder) as server:
        server.wait_until_ready()
        stream = Stream(server.url).wait_until_begun()
        server.popen.kill()
        server.popen.wait(20)
        stream.join(20)
        assert stream.error is not None
    begin = time.monotonic()
    with Process(folder, server.port) as again:
        again.wait_until_ready()
        answer = again.post().json()
        assert answer["usage"]["completion_tokens"] == 3
        assert time.monotonic() - begin < 60  # a few seconds on an idle machine
