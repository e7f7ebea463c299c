"""The two ways to ask: an LLM of this process, and an endpoint over HTTP."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from nybble.errors import ConfigError, RequestError
from nybble.eval.answerers import Decoding, Endpoint, LocalModel
from nybble.eval.task import Prompt


class Handler(BaseHTTPRequestHandler):
    """Answers from the server's queue of (status, body), else repeats the last message."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        status, answer = self.server.queue.pop(0) if self.server.queue else (200, echo(body))
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def echo(body):
    if "messages" in body:
        return {"choices": [{"message": {"content": "re: " + body["messages"][-1]["content"]}}]}
    return {"choices": [{"text": "on: " + body["prompt"]}]}


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.seen, found.queue = [], []
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def endpoint(server, **options):
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    return Endpoint(url, "m", pause=lambda _: None, **options)


def test_chat_and_completion_requests(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    asked = [
        Prompt("hello", system="be brief", max_tokens=7),
        Prompt("once", chat=False, stop=("\n",)),
    ]
    answers = endpoint(server, workers=1).answer(asked, [3, 4])
    assert answers == ["re: hello", "on: once"]
    (path, body, key), (raw_path, raw, _) = server.seen
    assert (path, raw_path) == ("/v1/chat/completions", "/v1/completions")
    assert key == "Bearer key"
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("m", 7, 0, 3)
    assert (raw["stop"], raw["seed"]) == (["\n"], 4)


def test_answers_keep_their_order(server):
    asked = [Prompt(str(i)) for i in range(20)]
    answers = endpoint(server, workers=5).answer(asked, range(20))
    assert answers == [f"re: {i}" for i in range(20)]


def test_a_busy_server_is_asked_again(server):
    server.queue += [(503, {}), (429, {})]
    assert endpoint(server).answer([Prompt("x")], [0]) == ["re: x"]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(404, {"error": "no model m"})], "404.*no model m.*is kept"),
        ([(400, {"error": {"message": "Too long: cut it."}})], r"400 [^{]*: Too long: cut it\.\)"),
        ([(400, b"<html>")], "400.*<html>"),
        ([(500, {})] * 4, "500.*run the same command again"),
        ([(200, {"hello": 1})], "no completion.*ends in /v1"),
        ([(200, b"<html>")], "no completion"),
        ([(200, {"choices": [{"message": None}]})], "no completion"),
        ([(200, {"choices": [None]})], "no completion"),
        ([(200, b"")], "no completion"),
    ],
)
def test_failures_say_what_to_do(server, replies, message):
    server.queue += replies
    with pytest.raises(RequestError, match=message):
        endpoint(server).answer([Prompt("x")], [0])


def test_a_server_that_is_not_there():
    with pytest.raises(RequestError, match="check that it runs"):
        Endpoint("http://127.0.0.1:9/v1", "m", pause=lambda _: None).answer([Prompt("x")], [0])
    with pytest.raises(ConfigError, match="http://localhost"):
        Endpoint("localhost:8000", "m")


def test_logprobs_of_options_over_http(server):
    top = {"choices": [{"logprobs": {"top_logprobs": [{" A": -1.0, " C": -0.5, "x": -9}]}}]}
    server.queue += [(200, top), (200, {"choices": [{"text": " A", "logprobs": None}]})]
    found = endpoint(server).option_logprobs("Q", (" A", " B", " C"))
    assert found == [-1.0, -math.inf, -0.5]
    with pytest.raises(RequestError, match="logprobs"):
        endpoint(server).option_logprobs("Q", (" A",))


def test_an_end_that_is_likeliest_hides_no_options(server):
    """Nothing is generated, so nothing has alternatives, until the end is ruled out."""
    top = {"choices": [{"logprobs": {"top_logprobs": [{" A": -1.0}]}}]}
    server.queue += [(200, {"choices": [{"text": "", "logprobs": {"top_logprobs": []}}]})]
    server.queue += [(200, top)]
    assert endpoint(server).option_logprobs("Q", (" A",)) == [-1.0]
    assert [body.get("ignore_eos") for _, body, _ in server.seen] == [None, True]


@pytest.mark.parametrize(
    "url",
    [
        *("http://localhost:99999/v1", "http://localhost:x/v1", "http://[::1/v1", "http:///v1"),
        *("http://local host/v1", "http://localhost/v1\n", "http://löcal/v1", "ftp://localhost"),
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(ConfigError, match="give a URL such as"):
        Endpoint(url, "m")


@pytest.mark.parametrize("key", ["ключ", "a\nb"])
def test_a_key_that_is_none(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is no key"):
        Endpoint("http://localhost/v1", "m")


def test_a_server_that_speaks_no_http_is_a_failure():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            for _ in range(4):
                with listener.accept()[0] as line:
                    line.sendall(b"SSH-2.0-OpenSSH\r\n")
                    line.shutdown(socket.SHUT_WR)
                    while line.recv(65536):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(RequestError, match=r"SSH-2\.0-OpenSSH\): check that it runs"):
            Endpoint(url, "m", pause=lambda _: None).answer([Prompt("x")], [0])
        thread.join()


def test_ctrl_c_does_not_wait_for_the_answers():
    code = """
import signal, socket, threading
from nybble.eval.answerers import Endpoint
from nybble.eval.task import Prompt

listener = socket.create_server(("127.0.0.1", 0))
listener.settimeout(30)
def interrupt():
    line = listener.accept()[0]
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    line.recv(1)
    threading.Event().wait()
threading.Thread(target=interrupt, daemon=True).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "m")
try:
    endpoint.answer([Prompt("x")], [0])
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n")


# -- an LLM of this process ----------------------------------------------------------------------


class ByteTokenizer:
    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class ByteLLM:
    """Predicts byte b after byte a with a logit of -(a * b % 251) / 10; answers with its prompt."""

    def __init__(self):
        self.tokenizer = ByteTokenizer()
        self.engine = SimpleNamespace(max_context=512)
        self.batches = []

    def chat_ids(self, text, *, system=None):
        return self.tokenizer.encode(f"[{system}]{text}")

    def encode(self, text):
        return self.tokenizer.encode(text)

    def logits(self, ids):
        table = torch.outer(torch.tensor(ids), torch.arange(256))
        return -(table % 251).float() / 10

    def generate(self, prompts, params):
        if isinstance(prompts[0], int):
            logprobs = self.logits(prompts)[-1].log_softmax(-1)
            order = logprobs.argsort(descending=True)[: params.logprobs].tolist()
            top = tuple((token, float(logprobs[token])) for token in order)
            first = SimpleNamespace(token_id=top[0][0], logprob=top[0][1], top=top)
            return SimpleNamespace(logprobs=[first])
        self.batches.append((len(prompts), params))
        return [SimpleNamespace(text=self.tokenizer.decode(ids)) for ids in prompts]


def test_greedy_prompts_share_a_batch():
    llm = ByteLLM()
    asked = [
        Prompt("a"),
        Prompt("b", chat=False),
        Prompt("c", system="s"),
        Prompt("d", stop=("x",)),
    ]
    answers = LocalModel(llm).answer(asked, [1, 2, 3, 4])
    assert answers == ["[None]a", "b", "[s]c", "[None]d"]
    assert [size for size, _ in llm.batches] == [3, 1]
    params = llm.batches[0][1]
    assert (params.greedy, params.repetition_penalty, params.max_tokens) == (True, 1.0, 2048)


def test_samples_are_drawn_each_with_its_seed():
    llm = ByteLLM()
    LocalModel(llm, Decoding(temperature=0.8, max_tokens=5)).answer([Prompt("a")] * 2, [1, 2])
    assert [(params.seed, params.max_tokens) for _, params in llm.batches] == [(1, 5), (2, 5)]


@pytest.mark.parametrize("alternatives", [256, 3])
@pytest.mark.parametrize("options", [("A", "B", "C"), (" A", " B", "CC")])
def test_logprobs_of_options_are_exact(alternatives, options, monkeypatch):
    monkeypatch.setattr(LocalModel, "_ALTERNATIVES", alternatives)
    llm = ByteLLM()
    found = LocalModel(llm).option_logprobs("Q", options)
    for option, logprob in zip(options, found, strict=True):
        ids = llm.encode("Q" + option)
        rows = llm.logits(ids).log_softmax(-1)
        expected = sum(float(rows[i][token]) for i, token in enumerate(ids[1:]))
        assert logprob == pytest.approx(expected, abs=1e-5)


def test_tokens_join_to_the_text():
    assert "".join(LocalModel(ByteLLM()).tokens("a b")) == "a b"
    llm = ByteLLM()
    llm.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        LocalModel(llm).tokens("x")
