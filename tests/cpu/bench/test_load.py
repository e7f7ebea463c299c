"""The load generator against a small server with known delays and known faults."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import threading
import time
from itertools import pairwise
from random import Random

import pytest
import uvicorn
from typer.testing import CliRunner

from nybble.bench.load import Load, Shot, Target, base_url, first_model
from nybble.bench.serve import in_flight, markdown, summarise, write
from nybble.bench.workload import Job, fixed, read_jobs, sharegpt_like, take
from nybble.cli.app import app
from nybble.errors import ConfigError

FIRST, NEXT = 0.06, 0.03  # seconds to the first piece of an answer, and between pieces


class FakeServer:
    """An ASGI application: `model` says what goes wrong, max_tokens how many pieces come."""

    def __init__(self):
        self.bodies, self.keys = [], []
        self.now = self.most = 0
        self.turn = asyncio.Semaphore(1)

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/v1/models":
            await self.plain(send, 200, {"data": [{"id": "good"}]})
            return
        assert scope["path"] == "/v1/chat/completions"
        body = json.loads(await read_body(receive))
        self.bodies.append(body)
        self.keys.append(dict(scope["headers"]).get(b"authorization"))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if body["model"] == "serial":
                async with self.turn:
                    await self.answer(send, body)
            else:
                await self.answer(send, body)
        finally:
            self.now -= 1

    async def answer(self, send, body):
        model = body["model"]
        if model == "plain":
            await self.plain(send, 200, {"choices": []})
            return
        if model.isdigit():
            await self.plain(send, int(model), {"error": {"message": "no | luck"}})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        await event(send, chunk({"role": "assistant", "content": ""}))
        for piece in range(body["max_tokens"]):
            await asyncio.sleep(NEXT if piece else FIRST)
            await event(send, chunk({"content": "word "}))
            if piece == 1 and model == "cut":
                raise ConnectionError("the line is cut")
            if piece == 1 and model == "garbage":
                await event(send, {"surprise": 1})
            if piece == 1 and model == "stuck":
                await asyncio.sleep(30)
            if piece == 1 and model == "sorry":
                await event(send, {"error": {"message": "out of memory"}})
        if model != "open-ended":
            await event(send, chunk({}, "stop"))
        usage = {"prompt_tokens": 11, "completion_tokens": body["max_tokens"]}
        await event(send, {"choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def plain(self, send, status, data):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(data).encode()})


EVENTS = (b"content-type", b"text/event-stream")


def chunk(delta, reason=None):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


async def event(send, data):
    body = b": still there\n\ndata: " + json.dumps(data).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def read_body(receive):
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message.get("more_body"):
            return body


@pytest.fixture
def fake():
    return FakeServer()


@pytest.fixture
def url(fake):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(fake, lifespan="off", log_config=None, timeout_graceful_shutdown=0)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def jobs(count, tokens=4):
    return [Job([{"role": "user", "content": f"number {i}"}], tokens) for i in range(count)]


# -- what is sent, and what is clocked -----------------------------------------------------------


def test_an_answer_is_clocked_as_its_client_sees_it(url, fake):
    shots = Load(Target(url, "good", api_key="secret"), jobs(3)).closed_loop(1)
    report = summarise({}, shots)
    assert (report.requests, report.finished, report.failures) == (3, 3, {})
    assert (report.prompt_tokens, report.new_tokens) == (33, 12)
    assert report.first_token.count == 3
    assert FIRST <= report.first_token.p50 < 5
    assert report.between_tokens.count == 9
    assert NEXT * 0.8 <= report.between_tokens.p50 < 5
    assert FIRST + 3 * NEXT <= report.whole.p50 < report.seconds
    assert fake.most == 1
    assert set(fake.keys) == {b"Bearer secret"}
    assert fake.bodies[0] == {
        "model": "good",
        "messages": jobs(1)[0].messages,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_closed_loop_keeps_so_many_in_flight(url, fake):
    done = []
    load = Load(Target(url, "good"), jobs(9), lambda *args: done.append(args))
    shots = load.closed_loop(3)
    assert fake.most == 3
    assert summarise({}, shots).most_in_flight == 3
    assert done == [(i, 9) for i in range(1, 10)]


def test_an_open_loop_does_not_wait_for_answers(url, fake):
    shots = Load(Target(url, "good"), jobs(30, 2)).open_loop(1000, Random(0))
    assert fake.most > 10
    assert all(shot.error is None for shot in shots)


def test_arrivals_are_poisson_and_repeatable():
    nobody = Target("http://127.0.0.1:9/v1", "good")
    first, second = (
        [shot.due for shot in Load(nobody, jobs(400)).open_loop(2000, Random(7))] for _ in range(2)
    )
    gaps = [after - before for before, after in pairwise(first)]
    assert first == second
    assert statistics.mean(gaps) == pytest.approx(1 / 2000, rel=0.2)
    # Of an exponential distribution mean and deviation are equal.
    assert statistics.stdev(gaps) == pytest.approx(1 / 2000, rel=0.3)


def test_a_server_that_falls_behind_cannot_hide_it(url):
    """One at a time, all due at once: the last one has waited for all the others."""
    shots = Load(Target(url, "serial"), jobs(6, 1)).open_loop(1e6, Random(0))
    waits = sorted(shot.tokens_at[0] - shot.due for shot in shots)
    assert all(wait >= FIRST * (turn + 1) * 0.9 for turn, wait in enumerate(waits))


def test_options_that_only_some_servers_know_are_sent_on_request(url, fake):
    Load(Target(url, "good", ignore_eos=True), jobs(1, 1)).closed_loop(1)
    assert fake.bodies[0]["ignore_eos"] is True


@pytest.mark.parametrize(
    ("model", "kind", "says"),
    [
        ("500", "HTTP 500", "no | luck"),
        ("429", "HTTP 429", "no | luck"),
        ("cut", "cut off", ""),
        ("open-ended", "cut off", "without a finish_reason"),
        ("garbage", "no chunk", "surprise"),
        ("sorry", "error event", "out of memory"),
        ("plain", "no stream", '{"choices": []}'),
        ("stuck", "timeout", ""),
    ],
)
def test_what_goes_wrong_is_counted_by_kind(model, kind, says, url):
    shots = Load(Target(url, model, timeout=0.5), jobs(2)).closed_loop(2)
    good = Load(Target(url, "good"), jobs(1)).closed_loop(1)
    report = summarise({}, [*shots, *good])
    assert report.finished == 1
    assert report.new_tokens == 4
    assert report.first_token.count == 1
    (failed,) = report.failures.items()
    assert failed[0] == kind
    assert failed[1].count == 2
    assert says in failed[1].example
    assert f"| {kind} | 2 |" in markdown(report)


def test_no_server_at_all():
    (shot,) = Load(Target("http://127.0.0.1:9/v1", "m"), jobs(1)).closed_loop(1)
    assert shot.error == "no connection"
    with pytest.raises(ConfigError, match=r"\(no connection\): check that the server runs"):
        first_model("http://127.0.0.1:9/v1", None)


@pytest.mark.parametrize("key", ["ключ", "a\nb"])
def test_a_key_that_is_none(key):
    with pytest.raises(ConfigError, match="--api-key is no key"):
        first_model("http://127.0.0.1:9/v1", key)


def test_a_server_without_models_says_why(fake, url, monkeypatch):
    async def refuse(send, status, data):
        await FakeServer.plain(fake, send, 401, {"error": {"message": "Wrong key."}})

    monkeypatch.setattr(fake, "plain", refuse)
    with pytest.raises(ConfigError, match=r"/models answered 401 \(Wrong key\.\): .*--api-key"):
        first_model(url, None)


def test_addresses(url):
    assert base_url("http://localhost:8000") == "http://localhost:8000/v1"
    assert base_url("https://host/api/v1/") == "https://host/api/v1"
    for wrong in (
        *("localhost:8000", "ftp://host", "http://", "/v1"),
        *("http://localhost:99999", "http://localhost:x", "http://[::1/v1", "http://a b/v1"),
    ):
        with pytest.raises(ConfigError, match="URL is"):
            base_url(wrong)
    assert first_model(url, None) == "good"


# -- workloads -----------------------------------------------------------------------------------


def words(job):
    return len(job.messages[0]["content"].split())


def test_lengths_as_in_sharegpt():
    some = take(sharegpt_like(Random(1)), 4000)
    assert some == take(sharegpt_like(Random(1)), 4000)
    assert some != take(sharegpt_like(Random(2)), 4000)
    prompts, answers = [words(job) for job in some], [job.max_tokens for job in some]
    assert min(prompts + answers) >= 4
    assert max(prompts + answers) <= 1024
    assert statistics.mean(prompts) == pytest.approx(161, rel=0.1)
    # The longest are cut, so that the mean falls.
    assert 250 < statistics.mean(answers) < 338


def test_fixed_lengths_share_no_prefix():
    some = take(fixed(50, 7, Random(0)), 20)
    assert {words(job) for job in some} == {50}
    assert {job.max_tokens for job in some} == {7}
    assert len({job.messages[0]["content"][:20] for job in some}) == 20


def test_files(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "hello\u2028", "output_tokens": 5}\n\n'
        '{"messages": [{"role": "system", "content": "x"}], "output_tokens": 6}\n'
        '{"prompt_tokens": 9, "output_tokens": 7}\n'
    )
    first, second, third = read_jobs(rows, Random(0))
    assert (first.messages[0]["content"], first.max_tokens) == ("hello\u2028", 5)
    assert (second.messages[0]["role"], second.max_tokens) == ("system", 6)
    assert (words(third), third.max_tokens) == (9, 7)
    assert take([first, second], 5) == [first, second, first, second, first]
    shared = tmp_path / "sharegpt.json"
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because." * 10}]
    halves = [turns[::-1], turns[:1], []]
    rows = [{"id": "1", "conversations": chat} for chat in (*halves, turns)]
    shared.write_text(json.dumps(rows))
    (only,) = read_jobs(shared, Random(0))
    assert (only.messages[0]["content"], only.max_tokens) == ("Why?", 20)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no rows"),
        ("{", "cannot be read"),
        ("5", "row 1 is no JSON object"),
        ('{"prompt": "a"}', "row 1: output_tokens is None"),
        ('{"prompt": "a", "output_tokens": 1}\n{"output_tokens": 0}', "row 2: output_tokens is 0"),
        ('{"output_tokens": 5}', "row 1: prompt_tokens is None"),
        ('[{"conversations": [{"value": "a"}]}]', "no chat that begins with a question"),
        ('[{"conversations": [], "id": 1}]', "no chat that begins with a question"),
        ('[{"conversations": "a"}]', "row 1: conversations is no list"),
    ],
)
def test_bad_files_are_refused_by_row(text, says, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_jobs(path, Random(0))


# -- reports -------------------------------------------------------------------------------------


def shot(due, tokens_at, ended, error=None):
    return Shot(due, ended, tokens_at, 10, len(tokens_at), error, "why" if error else "")


SHOTS = [
    shot(0.0, [1.0, 1.5, 2.0], 2.0),
    shot(0.5, [2.5, 3.5], 4.0),
    shot(1.0, [], 1.25, "HTTP 500"),
]


def test_the_numbers_of_a_report():
    report = summarise({"model": "m"}, SHOTS)
    assert (report.requests, report.finished, report.seconds) == (3, 2, 4.0)
    assert (report.request_rate, report.prompt_rate, report.token_rate) == (0.5, 5.0, 1.25)
    assert (report.first_token.mean, report.first_token.p50) == (1.5, 1.5)
    assert report.first_token.p90 == pytest.approx(1.9)
    assert (report.between_tokens.count, report.between_tokens.p50) == (3, 0.5)
    assert report.whole.mean == 2.75
    assert report.failures["HTTP 500"].count == 1
    assert in_flight(SHOTS) == [(0, 1), (0.5, 2), (1, 3), (1.25, 2), (2, 1), (4, 0)]
    assert report.most_in_flight == 3


def test_a_report_is_written_as_table_json_and_picture(tmp_path):
    report = summarise({"model": "m"}, SHOTS)
    paths = write(report, SHOTS, tmp_path / "new")
    assert [path.name for path in paths] == ["serve.json", "serve.md", "serve.png"]
    data = json.loads(paths[0].read_text())
    assert data["first_token"]["p50"] == 1.5
    assert data["new_tokens_per_second"] == 1.25
    assert data["failures"] == {"HTTP 500": {"count": 1, "example": "why"}}
    assert "| to the first token | 1,500.0 | 1,500.0 | 1,900.0 | 1,990.0 |" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_a_report_of_failures_alone():
    report = summarise({}, SHOTS[2:])
    assert report.first_token is None
    assert "milliseconds" not in markdown(report)


def test_a_picture_of_failures_alone_warns_of_nothing(tmp_path, recwarn):
    write(summarise({}, SHOTS[2:]), SHOTS[2:], tmp_path)
    assert not recwarn.list


# -- the command ---------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "serve", *arguments])


def test_the_command(url, fake, tmp_path):
    result = run(
        *(url, "--concurrency", "2", "--requests", "4", "--api-key", "k"),
        *("--prompt-tokens", "12", "--output-tokens", "2", "--out", str(tmp_path), "--json"),
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["about"] == {"model": "good", "requests": "from 2 clients", "lengths": "12 and 2"}
    assert (data["finished"], data["most_in_flight"]) == (4, 2)
    assert {body["max_tokens"] for body in fake.bodies} == {2}
    assert (tmp_path / "serve.png").exists()


def test_the_command_fails_where_nothing_was_answered(url):
    result = run(url, "--model", "500", "--rate", "100", "--requests", "3")
    assert result.exit_code == 1
    assert "| HTTP 500 | 3 |" in result.stdout
    assert "No request was answered" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "1", "--concurrency", "1"], "give one of them"),
        (["--prompt-tokens", "5"], "give both"),
        (["--prompts", "x.jsonl", "--output-tokens", "5"], "has the lengths"),
        (["--prompts", "x.jsonl"], "cannot be read"),
    ],
)
def test_options_that_do_not_go_together(arguments, says):
    result = run("http://127.0.0.1:9", *arguments)
    assert result.exit_code == 1
    assert says in result.stderr
