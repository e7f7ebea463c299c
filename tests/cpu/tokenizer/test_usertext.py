"""Marked text answers as plain text does, and never prints a character of a control token."""

from hypothesis import given
from hypothesis import strategies as st

from nybble.tokenizer.usertext import Marking, UserText

TOKENS = ("<|im_start|>", "<|im_end|>", "</think>", "<think>")
TEXT = st.lists(
    st.one_of(st.sampled_from([*TOKENS, "\n", " ", "im", "ab"]), st.text(max_size=3)), max_size=8
).map("".join)
ALPHABET = {c for token in TOKENS for c in token}


def marking(*seen):
    return Marking(TOKENS, seen)


def plain(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.plain if isinstance(value, UserText) else value


@given(text=TEXT)
def test_marking_can_be_undone_and_leaves_no_control_character(text):
    marked = marking(text).mark(text)
    assert marked.plain == text
    assert ALPHABET.isdisjoint(marked.__str__())
    assert len(marked) == len(text)


@given(text=st.text("\U000f0000\U000f0001\U000f0002<", max_size=6))
def test_private_characters_of_users_survive(text):
    assert marking(text).mark(text).plain == text


@given(text=TEXT, other=st.one_of(TEXT, st.sampled_from(TOKENS)))
def test_questions_are_answered_as_for_plain_text(text, other):
    marked = marking(text, other).mark(text)
    assert (other in marked) == (other in text)
    assert (marked == other, other == marked) == (text == other, other == text)
    assert (marked != other, marked < other) == (text != other, text < other)
    assert hash(marked) == hash(text)
    assert marked.find(other) == text.find(other)
    assert marked.count(other) == text.count(other)
    assert marked.startswith((other, "<")) == text.startswith((other, "<"))
    assert marked.endswith(other) == text.endswith(other)
    assert {text: 1}.get(marked) == {marked: 1}.get(text) == 1


@given(text=TEXT, sep=st.sampled_from([*TOKENS, "<", "|", "im", "\n", " "]), n=st.integers(-1, 2))
def test_cuts_are_those_of_plain_text(text, sep, n):
    marked = marking(text).mark(text)
    assert plain(marked.split(sep, n)) == text.split(sep, n)
    assert plain(marked.rsplit(sep, n)) == text.rsplit(sep, n)
    assert plain(marked.split()) == text.split()
    assert plain(marked.rsplit(None, 1)) == text.rsplit(None, 1)
    assert plain(marked.partition(sep)) == text.partition(sep)
    assert plain(marked.rpartition(sep)) == text.rpartition(sep)
    assert plain(marked.strip(sep)) == text.strip(sep)
    assert plain(marked.strip()) == text.strip()
    assert plain(marked.removeprefix(sep)) == text.removeprefix(sep)
    assert plain(marked.removesuffix(sep)) == text.removesuffix(sep)
    assert plain(marked.splitlines(True)) == text.splitlines(True)
    assert plain(marked[1:-1]) == text[1:-1]
    assert plain(marked.upper()) == text.upper()
    assert plain(marked.replace(sep, "-", n)) == text.replace(sep, "-", n)
    assert plain(marked.replace("", "-")) == text.replace("", "-")


@given(text=TEXT)
def test_each_character_keeps_its_mark_next_to_the_template_s(text):
    marked = "<think>" + marking(text).mark(text) + "</think>"
    assert marked.plain == f"<think>{text}</think>"
    assert marked.__str__().count("<think>") == 1
    assert marked.split("<think>")[-1].plain == marked.plain.split("<think>")[-1]
