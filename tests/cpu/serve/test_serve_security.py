"""What stands before the routes: the key, sizes, origins, ids, the log."""

from __future__ import annotations

import contextlib
import json
import logging

import httpx2
import pytest
from pydantic import ValidationError
from serving import serving

from nybble.errors import ConfigError
from nybble.serve.protocol import ChatRequest
from nybble.serve.settings import ServerSettings

CHAT = {"messages": [{"role": "user", "content": "the secret fox"}], "max_tokens": 2}
PATH = "/v1/chat/completions"


def error_of(reply):
    """The one shape that all errors have."""
    assert reply.headers["content-type"] == "application/json"
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error


# -- the key ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(llm):
    with serving(llm, api_key="open sesame", max_body=2000) as server, server.client() as http:
        yield http


HEADERS = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "open sesame"}]


@pytest.mark.parametrize("headers", [*HEADERS, {"Authorization": "Bearer ü"}], ids=str)
@pytest.mark.parametrize(
    "path", [PATH, "/v1/models", "/metrics", "/tokenize", "/nosuch", "/openapi.json"]
)
def test_without_the_key_nothing_is_told(locked, path, headers):
    headers = {name: value.encode() for name, value in headers.items()}
    reply = locked.post(path, json=CHAT, headers=headers)
    assert reply.status_code == 401
    assert error_of(reply)["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"


def test_with_the_key_and_without_need_of_one(locked):
    reply = locked.post(PATH, json=CHAT, headers={"Authorization": "Bearer open sesame"})
    assert reply.status_code == 200
    assert locked.get("/health").status_code == 200
    assert locked.get("/").status_code == 200


def test_a_public_address_needs_a_key_or_a_word():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="--api-key"):
            ServerSettings(names=("m",), host=host)
        ServerSettings(names=("m",), host=host, api_key="k")
        ServerSettings(names=("m",), host=host, allow_public=True)
    for host in ("127.0.0.1", "::1", "localhost"):
        ServerSettings(names=("m",), host=host)


@pytest.mark.parametrize(
    "bad",
    [
        {"names": ()},
        {"port": 70000},
        {"api_key": ""},
        {"api_key": "schlüssel"},
        {"api_key": "key\n"},
        {"api_key": " key"},
        {"api_key": "k\tey"},
        {"max_body": 0},
        {"drain_seconds": -1.0},
        {"request_seconds": float("nan")},
        {"max_waiting": -1},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(bad):
    with pytest.raises(ConfigError, match=r": |give"):
        ServerSettings(**{"names": ("m",), **bad})


def test_without_a_key_only_this_machines_names_are_answered(llm, http):
    """A page of another site cannot reach the server under a name of its own."""
    for good in ("localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "[::1]"):
        assert http.get("/version", headers={"host": good}).status_code == 200
    for bad in ("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", ""):
        reply = http.get("/version", headers={"host": bad})
        assert reply.status_code == 403
        assert error_of(reply)["code"] == "unknown_host"


@pytest.mark.parametrize("options", [{"allow_public": True}, {"api_key": "k"}], ids=str)
def test_behind_a_proxy_any_name_will_do(llm, options):
    headers = {"host": "llm.example", "authorization": "Bearer k"}
    with serving(llm, **options) as server, server.client() as http:
        assert http.get("/version", headers=headers).status_code == 200


# -- sizes and shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])
def test_a_body_that_is_too_large(locked, told):
    data = b"x" * 3000
    content = data if told else (data[i : i + 100] for i in range(0, 3000, 100))
    reply = locked.post(PATH, content=content, headers={"Authorization": "Bearer open sesame"})
    assert reply.status_code == 413
    assert "2000 bytes" in error_of(reply)["message"]


BROKEN = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"messages": "\xed\xa0\x80"}',
    b"[" * 5000,
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: str(content[:30]))
def test_bodies_that_are_no_json(http, content):
    reply = http.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert error_of(reply)["type"] == "invalid_request_error"


@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {}], ids=str)
def test_a_body_of_another_type_or_none(http, headers):
    """Any web page may make a browser send these to localhost: only JSON needs its leave."""
    content = json.dumps(CHAT).encode()
    request = http.build_request("POST", PATH, content=content, headers=headers)
    assert request.headers.get("content-type") == headers.get("Content-Type")
    reply = http.send(request)
    assert reply.status_code == 400
    assert "application/json" in error_of(reply)["message"]


CALL = {"id": "1", "function": {"name": "f", "arguments": ""}}
MANY = {
    "messages": {"messages": [0] * 999},
    "unknown fields": {"messages": CHAT["messages"], **{f"x{i}": 0 for i in range(999)}},
    "content": {"messages": [{"role": "user", "content": [{"type": "text"}] * 999}]},
    "no content": {"messages": [{"role": "user", "content": [0] * 999}]},
    "calls": {"messages": [{"role": "assistant", "tool_calls": [CALL] * 999}]},
    "tools": {**CHAT, "tools": [0] * 99},
    "functions": {**CHAT, "functions": [0] * 99},
    "stop_token_ids": {**CHAT, "stop_token_ids": ["a"] * 999},
    "logit_bias": {**CHAT, "logit_bias": {str(i): "a" for i in range(999)}},
}


@pytest.mark.parametrize("fields", MANY.values(), ids=MANY)
def test_a_body_full_of_errors_is_refused_for_the_first(fields):
    """An object for each of a million would keep everybody waiting for seconds."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(fields)
    assert caught.value.error_count() <= 2


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (PATH, {"messages": [{"role": "user", "content": "x" * 20_000}]}),
        (PATH, {"messages": CHAT["messages"] * 300}),
        ("/v1/completions", {"prompt": "x" * 20_000}),
        ("/tokenize", {"prompt": "x" * 20_000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 20_000}]}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_context_can_hold_is_not_even_encoded(llm, monkeypatch, path, fields):
    with serving(llm) as server, server.client() as http:
        for name in ("encode", "apply_chat"):
            monkeypatch.setattr(llm.tokenizer, name, None)
        reply = http.post(path, json=fields)
    assert reply.status_code == 400
    assert error_of(reply)["code"] == "context_length_exceeded"


def test_a_bias_for_each_of_many_answers(http, monkeypatch):
    monkeypatch.setattr("nybble.serve.service.MOST_BIASES", 9)
    fields = {**CHAT, "logit_bias": {"5": 1, "6": 1, "7": 1}}
    assert http.post(PATH, json={**fields, "n": 3}).status_code == 200
    reply = http.post(PATH, json={**fields, "n": 4})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "logit_bias")


def test_lone_surrogates_are_refused(http):
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    reply = http.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


def test_paths_and_methods_that_do_not_exist(http):
    reply = http.get("/v1/nosuch")
    assert reply.status_code == 404
    error_of(reply)
    reply = http.get(PATH)
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    error_of(reply)


# -- origins ---------------------------------------------------------------------------------------


def preflight(http, origin):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return http.options(
        PATH, headers={**headers, "Access-Control-Request-Headers": "authorization"}
    )


def test_other_origins_are_shut_out_by_default(http):
    assert "access-control-allow-origin" not in preflight(http, "https://a.example").headers


def test_an_origin_that_was_let_in(llm):
    with (
        serving(llm, cors_origins=("https://a.example",), api_key="k") as server,
        server.client() as http,
    ):
        reply = preflight(http, "https://a.example")
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        assert preflight(http, "https://b.example").status_code == 400
        reply = http.post(PATH, json=CHAT, headers={"Origin": "https://a.example"})
        assert reply.status_code == 401
        assert reply.headers["access-control-allow-origin"] == "https://a.example"


# -- ids and the log -------------------------------------------------------------------------------


def test_a_request_id_is_taken_if_it_is_sane(http):
    assert (
        http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    )
    for bad in ("a b", "x" * 200, "ü".encode()):
        made = http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made.startswith("req-")


def test_the_log_tells_how_much_but_never_what(http, caplog):
    with caplog.at_level(logging.DEBUG):
        http.post(PATH, json={**CHAT, "user": "Ann"}, headers={"x-request-id": "mine-2"})
        http.post(PATH, json={**CHAT, "temperature": -1})
        http.get("/the/secret/fox")
        http.post("/tokenize", json={"prompt": "the secret fox"})
    logs = ("nybble", "nybble.serve", "uvicorn.error")
    lines = [record.getMessage() for record in caplog.records if record.name in logs]
    assert lines[0].startswith("mine-2 POST /v1/chat/completions 200 ")
    assert "+ 2 tokens" in lines[0]
    assert " 400 invalid_request" in lines[1]
    assert " 404 not_found" in lines[2]
    assert " 200 done" in lines[3]
    assert len(lines) == 4
    assert not any(word in line for line in lines for word in ("secret", "fox", "Ann"))


@pytest.mark.parametrize("broken", ["Service.chat_ids", "answers.TextBuilder.push"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_no_client_that_hung_up(llm, caplog, monkeypatch, broken, stream):
    caplog.set_level(logging.INFO, logger="nybble.serve")
    module = "nybble.serve." + ("service." if broken.startswith("Service") else "")
    with serving(llm) as server, server.client() as http:
        monkeypatch.setattr(module + broken, lambda *_: {}["a bug"])
        with contextlib.suppress(httpx2.RemoteProtocolError):
            http.post(PATH, json={**CHAT, "stream": stream})
        server.wait_until_idle()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "nybble.serve"]
    assert " 500 error, " in line


def test_prompts_are_logged_for_those_who_ask(llm, caplog):
    caplog.set_level(logging.INFO, logger="nybble.serve")
    with serving(llm, log_prompts=True) as server, server.client() as http:
        http.post(PATH, json=CHAT, headers={"x-request-id": "mine-3"})
        for prompt in (["two\nlines"], [[1, 2]]):
            http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    lines = [record.getMessage() for record in caplog.records if " prompt: " in record.getMessage()]
    assert len(lines) == 3
    assert lines[0].startswith('mine-3 prompt: "')
    assert "the secret fox" in lines[0]
    assert '"two\\nlines"' in lines[1]
    assert not any("\n" in line for line in lines)
