"""From tokens to pieces of text, with the engine's side played."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.sampler import TokenLogprob
from nybble.sampling import SamplingParams
from nybble.serve.answers import Answer
from nybble.serve.record import RequestRecord


class Played:
    """A generation whose tokens come in bursts: [[first, second], [third], ...]."""

    def __init__(self, bursts, **params):
        self.params = SamplingParams(**params)
        self.bursts = [list(burst) for burst in bursts if burst]
        self.logprobs, self.prompt_logprobs, self.prompt_ids = [], [], [1]
        self.finish_reason = None
        self.closed = False

    def __aiter__(self):
        return self

    @property
    def ready(self):
        return bool(self.bursts and self.bursts[0])

    async def __anext__(self):
        if self.bursts and not self.bursts[0]:
            self.bursts.pop(0)
            await asyncio.sleep(0)
        if not self.bursts or self.closed:
            self.finish_reason = "length"
            raise StopAsyncIteration
        token = self.bursts[0].pop(0)
        self.logprobs.append(TokenLogprob(token, -1.0))
        return token

    def close(self, error=None):
        self.closed = True


def pieces_of(llm, bursts, **params):
    async def read():
        answer = Answer(0, Played(bursts, **params), llm.tokenizer)
        return [piece async for piece in answer.pieces(RequestRecord())]

    return asyncio.run(read())


def test_what_came_at_a_time_is_one_piece(llm):
    (fox, dog) = (llm.tokenizer.encode(text) for text in ("the fox", " a lazy dog"))
    pieces = pieces_of(llm, [fox, dog])
    assert [piece.text for piece in pieces] == ["the fox", " a lazy dog", ""]
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]
    assert len(pieces_of(llm, [[token] for token in fox])) == len(fox) + 1


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_and_log_probabilities_cover_the_text(llm, data):
    """However the tokens come, whatever they spell, with and without a stop text."""
    ids = data.draw(st.lists(st.integers(3, llm.tokenizer.vocab_size - 1), min_size=1, max_size=30))
    ends = sorted(data.draw(st.sets(st.integers(1, len(ids)))) | {len(ids)})
    whole = llm.tokenizer.decode(ids, skip_special_tokens=True)
    begin = data.draw(st.integers(0, max(len(whole) - 1, 0)))
    stop = whole[begin : begin + data.draw(st.integers(1, 3))]
    stops = (stop,) if stop and data.draw(st.booleans()) else ()
    bursts = [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    pieces = pieces_of(llm, bursts, logprobs=0, stop=stops)
    text = "".join(piece.text for piece in pieces)
    placed = [entry for piece in pieces for entry in piece.logprobs]
    assert text == (whole.split(stops[0])[0] if stops else whole)
    assert [entry.token for entry in placed] == ids[: len(placed)]
    assert pieces[-1].finish_reason == ("stop" if stops else "length")
    if stops:
        assert all(entry.offset < len(text) for entry in placed)
    else:
        assert len(placed) == len(ids)
