"""Calibration files of every form, through a tokenizer that spells bytes."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import ConfigError
from nybble.gptq.calibrate import CalibrationOptions, read_windows
from nybble.tokenizer import Tokenizer

CHAT = [
    {"role": "user", "content": "What is a nybble? " * 20},
    {"role": "assistant", "content": "Half a byte."},
]


class Bytes(Tokenizer):
    """One id a byte; a chat is its roles and texts, one after another."""

    special_tokens = MappingProxyType({})
    hidden_ids = frozenset()
    eos_token_ids = frozenset()
    vocab_size = 256

    def _encode_plain(self, text):
        return list(text.encode())

    def _token_bytes(self, token):
        return bytes([token])

    def render_chat(self, messages, tools=None, add_generation_prompt=True, **template_kwargs):
        assert not add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def apply_chat(self, messages, tools=None, add_generation_prompt=True, **template_kwargs):
        return self._encode_plain(self.render_chat(messages, tools, add_generation_prompt))


TOKENIZER = Bytes()


def windows_of(path, text, **options):
    path.write_text(text, encoding="utf-8")
    return read_windows(TOKENIZER, path, CalibrationOptions(**options))


def spell(window):
    return bytes(window).decode()


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(256, 3000), samples=st.integers(1, 20), length=st.integers(1, 600))
def test_plain_text_is_cut_into_full_windows_in_order(tmp_path_factory, tokens, samples, length):
    text = "".join(chr(97 + i % 26) for i in range(tokens))
    path = tmp_path_factory.mktemp("plain") / "text.txt"
    windows = windows_of(path, text, samples=samples, length=length)
    assert len(windows) == min(samples, max(tokens // length, 1))
    assert text.startswith("".join(map(spell, windows)))
    assert all(len(window) == min(length, tokens) for window in windows)


def test_a_seed_takes_other_windows_and_always_the_same(tmp_path):
    text = "".join(f"{i:06d}" for i in range(2000))
    first = windows_of(tmp_path / "a", text, samples=5, length=60)
    seeded = windows_of(tmp_path / "a", text, samples=5, length=60, seed=1)
    assert seeded != first
    assert seeded == windows_of(tmp_path / "a", text, samples=5, length=60, seed=1)
    assert seeded != windows_of(tmp_path / "a", text, samples=5, length=60, seed=2)


def test_jsonl_holds_texts_and_chats(tmp_path):
    lines = [{"text": "one " * 100}, {"messages": CHAT}, {"text": "short"}]
    text = "\n\n".join(json.dumps(line) for line in lines)
    windows = windows_of(tmp_path / "data.jsonl", text, length=150)
    assert [spell(window)[:8] for window in windows] == [
        "one one ",
        "e one on",
        "<user>Wh",
        "short",
    ]
    assert len(windows[2]) == 150


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    texts = ["one" + separator + "two " * 100, "three " * 100]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    windows = windows_of(tmp_path / "data.jsonl", "\r\n".join(lines) + "\r\n")
    assert [spell(window) for window in windows] == texts


def test_a_row_without_text_is_passed_over(tmp_path):
    lines = [{"text": "one " * 100}, {"text": ""}, {"messages": []}]
    text = "\n".join(map(json.dumps, lines))
    assert [spell(w) for w in windows_of(tmp_path / "data.jsonl", text)] == ["one " * 100]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    record = {"text": "one " * 100}
    text = {"jsonl": json.dumps(record), "json": json.dumps([record]), "txt": record["text"]}
    [window] = windows_of(tmp_path / name, "\ufeff" + text[name.partition(".")[2]])
    assert spell(window) == record["text"]


@pytest.mark.parametrize(("human", "model"), [("user", "assistant"), ("human", "gpt")])
def test_the_first_generations_training_data(tmp_path, human, model):
    turns = [{"from": human, "value": CHAT[0]["content"]}, {"from": model, "value": "Half."}]
    data = json.dumps([{"id": "identity_0", "conversations": turns}], indent=1)
    [window] = windows_of(tmp_path / "data.json", data)
    assert spell(window) == f"<user>{CHAT[0]['content']}<assistant>Half."


def test_the_default_text_has_english_chinese_and_code():
    windows = read_windows(TOKENIZER)
    text = b"".join(bytes(window) for window in windows).decode(errors="ignore")
    assert len(text) > 45_000
    assert "def " in text
    assert sum("一" <= letter <= "鿿" for letter in text) > 2000


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n ", "is empty"),
        ("a.txt", b"too short", "9 tokens, too few"),
        ("a.txt", b"good \xff bad", "not UTF-8 at byte 5"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"prompt": "x"}', 'line 1: nothing to read here: give "text"'),
        ("a.jsonl", b"3", "line 1: nothing to read"),
        ("a.json", b'[{"conversations": [{"from": "robot", "value": "x"}]}]', "item 1: a turn"),
        ("a.json", b'[{"conversations": ["x"]}]', "item 1: a turn needs"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        read_windows(TOKENIZER, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.* does not exist: give"):
        read_windows(TOKENIZER, tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match="is no plain file: give"):
        read_windows(TOKENIZER, tmp_path)


@pytest.mark.parametrize("options", [{"samples": 0}, {"length": -1}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigError, match="give at least 1"):
        CalibrationOptions(**options)
