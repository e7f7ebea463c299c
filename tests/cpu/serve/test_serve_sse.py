"""Event streams against clients of all kinds, without a socket."""

from __future__ import annotations

import asyncio

import pytest

from nybble.errors import NumericsError
from nybble.serve import sse
from nybble.serve.settings import ServerSettings

SETTINGS = ServerSettings(names=("toy",), request_seconds=0.1, keep_alive_seconds=0.02)


def run(events, send, receive=None):
    async def main():
        stream = await sse.EventStream.open(events, SETTINGS)
        await asyncio.wait_for(stream({}, receive or forever, send), 10)

    asyncio.run(main())


async def forever():
    await asyncio.Event().wait()


class Source:
    """Events, and whether their generator was closed."""

    def __init__(self, *events, error=None, pause=0.0):
        self.given, self.error, self.pause, self.closed = events, error, pause, False

    async def events(self):
        try:
            for event in self.given:
                yield event
                await asyncio.sleep(self.pause)
            if self.error:
                raise self.error
        finally:
            self.closed = True


class Client:
    def __init__(self):
        self.messages = []

    async def send(self, message):
        self.messages.append(message)

    @property
    def text(self):
        return b"".join(m.get("body", b"") for m in self.messages).decode()


def test_events_and_the_end():
    client, source = Client(), Source("", "one", "two")
    run(source.events(), client.send)
    assert client.text == "data: one\n\ndata: two\n\ndata: [DONE]\n\n"
    start, *_, end = client.messages
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert b"content-length" not in headers
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}
    assert source.closed


def test_an_error_in_the_middle_is_an_event():
    client, source = Client(), Source("one", error=NumericsError("No numbers: stop."))
    run(source.events(), client.send)
    _, error, done, _ = client.text.split("\n\n")
    assert '"message": "No numbers: stop."' in error
    assert done == "data: [DONE]"


def test_an_error_before_the_first_event_has_a_status_of_its_own():
    source = Source(error=NumericsError("No numbers: stop."))
    with pytest.raises(NumericsError):
        run(source.events(), Client().send)
    assert source.closed


def test_silence_is_filled_with_comments():
    client, source = Client(), Source("one", "two", pause=0.07)
    run(source.events(), client.send)
    assert client.text.startswith("data: one\n\n: keep-alive\n\n")
    assert client.text.endswith("data: [DONE]\n\n")


def test_a_client_that_hangs_up_closes_the_source():
    source = Source(*["x"] * 1000, pause=0.01)

    async def receive():
        await asyncio.sleep(0.03)
        return {"type": "http.disconnect"}

    client = Client()
    run(source.events(), client.send, receive)
    assert source.closed
    assert 1 <= client.text.count("data: x") < 20
    assert "DONE" not in client.text


def test_a_client_that_takes_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(sse, "_GRACE_SECONDS", 0.0)
    source = Source(*["x"] * 10)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    run(source.events(), send)
    assert source.closed


def test_work_that_is_cancelled_from_outside_cancels_what_it_does():
    done = []

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            done.append("cleaned up")

    async def main():
        task = asyncio.create_task(sse.while_connected(forever, work()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert done == ["cleaned up"]
