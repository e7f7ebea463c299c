"""How the tests read a reply."""

from __future__ import annotations

from nybble.tools import CallDelta, Reply, TextDelta


def read(parser, pieces):
    """The reply that a parser makes of pieces, and its deltas."""
    deltas = []
    for piece in pieces:
        deltas += parser.push(piece)
    deltas += parser.finish()
    reply = Reply()
    for delta in deltas:
        reply.add(delta)
    return reply, deltas


def streamed(deltas):
    """What a client sees of a stream: its text, and each call's name and arguments."""
    text, calls = "", {}
    for delta in deltas:
        if isinstance(delta, TextDelta):
            text += delta.text
        elif isinstance(delta, CallDelta):
            name, arguments = calls.get(delta.index, (None, ""))
            assert name is None or delta.name is None
            assert name is not None or delta.name is not None, "the name comes first"
            calls[delta.index] = (name or delta.name, arguments + delta.arguments)
    assert list(calls) == list(range(len(calls)))
    return text, list(calls.values())


def calls_of(reply):
    return [(call.name, call.arguments) for call in reply.calls]
