"""Streaming equals batch: whole characters, and stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.errors import RequestError
from nybble.tokenizer import StopMatcher, StreamDecoder

SPECIAL_IDS = st.integers(151643, 151850)
BYTE_IDS = st.integers(0, 255)  # single bytes: mostly invalid UTF-8
IDS = st.lists(st.one_of(BYTE_IDS, SPECIAL_IDS, st.integers(0, 151642)), max_size=30)
LETTERS = st.text("ab1,", max_size=20)
STOPS = st.lists(st.text("ab1,", min_size=1, max_size=5), max_size=4)


@given(ids=IDS, skip=st.booleans())
def test_pieces_join_to_the_decoded_whole(qwen, ids, skip):
    decoder = StreamDecoder(qwen, skip_special_tokens=skip)
    pieces = [decoder.push(token) for token in ids] + [decoder.finish()]
    assert "".join(pieces) == qwen.decode(ids, skip_special_tokens=skip)


@given(text=st.text())
def test_no_piece_of_valid_text_holds_a_replacement(qwen, text):
    decoder = StreamDecoder(qwen)
    pieces = [decoder.push(token) for token in qwen.encode(text)]
    assert decoder.finish() == ""
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_an_unfinished_character_is_replaced_at_the_end(qwen):
    decoder = StreamDecoder(qwen)
    first = qwen.encode("👩‍👩")[0]
    half = next(i for i in range(256) if qwen.decode_bytes([i]) == b"\xe4")
    assert decoder.push(first) == qwen.decode([first])
    assert decoder.push(half) == ""
    assert decoder.finish() == "\ufffd"


def first_stop(text, stops):
    """(text before the earliest stop string, that string; the shortest of those that tie)."""
    found = min(((text.find(s), len(s), s) for s in stops if s in text), default=None)
    return (text, None) if found is None else (text[: found[0]], found[2])


def run(stops, pieces):
    matcher = StopMatcher(stops)
    shown = [matcher.push(piece)[0] for piece in pieces]
    return "".join([*shown, matcher.finish()]), matcher.stop


@given(stops=STOPS, pieces=st.lists(LETTERS, max_size=12))
def test_any_split_stops_where_the_whole_text_does(stops, pieces):
    assert run(stops, pieces) == first_stop("".join(pieces), stops)


@given(stops=STOPS, pieces=st.lists(LETTERS, max_size=12))
def test_only_what_may_become_a_stop_is_held_back(stops, pieces):
    matcher, shown, given_in = StopMatcher(stops), "", ""
    for piece in pieces:
        given_in += piece
        shown += matcher.push(piece)[0]
        if matcher.stop is not None:
            break
        held = given_in[len(shown) :]
        assert not held or any(s.startswith(held) or held.startswith(s) or s in held for s in stops)
        assert len(held) < max(map(len, stops), default=1)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stop"),
    [
        (["1,1,2"], list("1,1,1,2"), "1,", "1,1,2"),  # the matcher must not start over
        (["abcd", "bc"], ["ab", "c", "d!"], "", "abcd"),  # it began first
        (["abcd", "bc"], ["ab", "c", "x!"], "a", "bc"),
        (["abcd", "bc"], ["ab", "c"], "a", "bc"),  # the text ends: what is complete counts
        (["aa", "aaa"], ["aaa"], "", "aa"),
        (["\n\nQ:"], ["yes\n", "\nA"], "yes\n\nA", None),
        ([], ["abc"], "abc", None),
    ],
)
def test_overlapping_and_nested_stops(stops, pieces, shown, stop):
    assert run(stops, pieces) == (shown, stop)


def test_after_a_stop_nothing_more_is_shown():
    matcher = StopMatcher(["x"])
    assert matcher.push("abxc") == ("ab", "x")
    assert matcher.push("more") == ("", "x")
    assert matcher.finish() == ""


@pytest.mark.parametrize("stops", ["ab", [""], [1]])
def test_stops_that_are_none_are_refused(stops):
    with pytest.raises(RequestError, match="non-empty"):
        StopMatcher(stops)
