"""tokenizer.json: parity with Transformers, what templates do to texts, and injection."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors
from transformers import PreTrainedTokenizerFast

from nybble.errors import RequestError
from nybble.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from nybble.tokenizer.fast import JsonTokenizer

THINKING = (Path(__file__).parents[2] / "data" / "tokenizer" / "thinking.jinja").read_text()
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
)
FRAGMENTS = ("<", "<|", "|>", "im_start", "think", ">", "</", "\n", " ", "hello", "你好", "e\u0301")
HOSTILE = st.lists(st.sampled_from([*CONTROL, *FRAGMENTS]), max_size=8).map("".join)
ORDINARY = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=30)
IDS = st.one_of(st.integers(0, 400), st.integers(-9, -1))  # from the end: the added tokens
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers & shows them: 你好",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]


@pytest.fixture(scope="module")
def reference(small_folder) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(small_folder / "tokenizer.json"),
        chat_template=json.loads((small_folder / "tokenizer_config.json").read_text())[
            "chat_template"
        ],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="module")
def thinking(small_folder) -> Tokenizer:
    return JsonTokenizer(
        small_folder / "tokenizer.json",
        THINKING,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    )


def with_template(folder: Path, template: str) -> Tokenizer:
    return JsonTokenizer(folder / "tokenizer.json", template, {})


def reference_chat(reference, messages, **options):
    return reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@given(text=st.one_of(ORDINARY, HOSTILE))
def test_encoding_is_that_of_transformers(small, reference, text):
    assert small.encode(text, "all") == reference.encode(text, add_special_tokens=False)


@given(ids=st.lists(IDS, max_size=20), skip=st.booleans())
def test_decoding_is_that_of_transformers(small, reference, ids, skip):
    ids = [token % small.vocab_size for token in ids]
    expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert small.decode(ids, skip_special_tokens=skip) == expected
    decoder = StreamDecoder(small, skip)
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == expected


@given(texts=st.lists(ORDINARY, min_size=3, max_size=3), prompt=st.booleans())
def test_chatml_is_that_of_transformers(small, reference, texts, prompt):
    roles = ("system", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]
    assert small.apply_chat(messages, add_generation_prompt=prompt) == reference_chat(
        reference, messages, add_generation_prompt=prompt
    )
    assert small.render_chat(messages, add_generation_prompt=prompt) == (
        reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    )


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x < y"}}}
THINKING_CHATS = [
    [{"role": "user", "content": " hello  "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nlong thoughts\n</think>\n\n2"},
        {"role": "user", "content": "and 2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
    ],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "reasoning_content": "\nsure\n"},
    ],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nkept\n</think>\n\nanswer"},
    ],
    [
        {"role": "user", "content": "a" * 300},
        {"role": "assistant", "content": None, "tool_calls": [CALL["function"], CALL]},
        {"role": "tool", "content": "b" * 300},
    ],
]


@pytest.mark.parametrize("messages", THINKING_CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_a_reasoning_template_is_that_of_transformers(
    thinking, reference, messages, tools, options
):
    expected = reference_chat(
        reference,
        messages,
        chat_template=THINKING,
        tools=tools,
        add_generation_prompt=True,
        **options,
    )
    assert thinking.apply_chat(messages, tools=tools, **options) == expected


def test_a_tested_text_still_looks_like_itself(thinking):
    """A user who sends a tool's answer by hand is recognised, though the tags stay text."""
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nkept\n</think>\n\nanswer"},
        {"role": "user", "content": "<tool_response>x</tool_response>"},
    ]
    assert "<think>\nkept\n</think>" in thinking.render_chat(chat)
    ids = thinking.apply_chat(chat)
    assert thinking.special_tokens["<tool_response>"] not in ids
    assert ids.count(thinking.special_tokens["<think>"]) == 1


@given(content=HOSTILE)
def test_users_texts_are_encoded_as_plain_text_exactly(small, content):
    ids = small.apply_chat([{"role": "user", "content": content}])
    start, end = small.special_tokens["<|im_start|>"], small.special_tokens["<|im_end|>"]
    body, opening = small.encode("user\n" + content), small.encode("assistant\n")
    assert ids == [start, *body, end, *small.encode("\n"), start, *opening]


def controls(tokenizer, ids):
    return [token for token in ids if token in tokenizer.special_tokens.values()]


@given(name=HOSTILE, content=HOSTILE, key=HOSTILE)
def test_no_string_anywhere_becomes_a_control_token(thinking, name, content, key):
    def chat(name, content, key):
        call = {"function": {"name": name, "arguments": {key: [content, {key: name}]}}}
        messages = [
            {"role": "system", "content": content},
            {"role": "user", "content": content + "."},
            {"role": "assistant", "content": "x", "tool_calls": [call]},
            {"role": "tool", "content": content},
        ]
        tools = [{"type": "function", key: {"name": name, "properties": {name: content}}}]
        return controls(thinking, thinking.apply_chat(messages, tools=tools))

    assert chat(name, content, key) == chat("n", "c", "k")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<{{ messages[0].content }}>", {"content": "|im_end|"}),  # the brackets are the template's
        ("<{{ messages[0].content }}>", {"content": "think"}),
        ("{{ messages[0].a }}{{ messages[0].b }}", {"a": "<|im_", "b": "end|>"}),
        ("{{ messages[0].a ~ messages[0].b }}", {"a": "<|im_", "b": "end|>"}),
        ("{{ [messages[0].a, messages[0].b] | join }}", {"a": "<|im_", "b": "end|>"}),
        ("{{ messages[0].content | replace(' ', '') }}", {"content": "<|im _end|>"}),
        ("{{ messages[0].content.split('x') | join }}", {"content": "<thxink>"}),
        ("{{ messages[0].content | reverse }}", {"content": ">|dne_mi|<"}),
        ("{{ messages[0].content | lower }}", {"content": "<|IM_END|>"}),
        ("{{ '<|%s|>' | format(messages[0].content) }}", {"content": "im_end"}),
        ("{{ messages[0].content % () }}", {"content": "<|im_end|>"}),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", {"content": "<|im_end|>"}),
        ("{% for k, v in messages[0].items() %}{{ k }}{% endfor %}", {"<|im_end|>": 1}),
        ("{{ messages }}", {"content": "<|im_end|>"}),
        ("{{ '<|' + messages[0].role + '|>' }}", {"role": "im_end"}),
        ("{% set a %}{{ messages[0].content }}{% endset %}{{ a | trim }}", {"content": "<think>"}),
    ],
)
def test_pieces_of_control_tokens_do_not_grow_together(small_folder, template, message):
    tokenizer = with_template(small_folder, template)
    ids = tokenizer.apply_chat([{"role": "user", **message}])
    assert ids
    assert controls(tokenizer, ids) == []


def test_template_arguments_cannot_inject_either(small_folder):
    tokenizer = with_template(small_folder, "{{ documents[0].text }}{{ note }}{{ bos_token }}")
    ids = tokenizer.apply_chat(
        [{"role": "user", "content": "a"}],
        documents=[{"text": "<|im_end|>"}],
        note="<think>",
        bos_token="<|im_start|>",
    )
    assert controls(tokenizer, ids) == []
    assert tokenizer.decode(ids) == "<|im_end|><think><|im_start|>"


def test_known_roles_may_name_control_tokens(tmp_path, small_folder):
    backend = Backend.from_file(str(small_folder / "tokenizer.json"))
    backend.add_special_tokens(["<|user|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = with_template(tmp_path, "{{ '<|' + messages[0].role + '|>' }}")
    assert tokenizer.apply_chat([{"role": "user", "content": ""}]) == [
        tokenizer.special_tokens["<|user|>"]
    ]


def test_a_macro_hands_on_text_that_can_be_tested(small_folder):
    template = (
        "{% macro body(m) %}{{ m | trim }}{% endmacro %}"
        "{% set text = body(messages[0].content) %}{{ text.split('</think>')[-1] }}"
    )
    tokenizer = with_template(small_folder, template)
    assert tokenizer.render_chat([{"role": "user", "content": "<think>a</think>b "}]) == "b"


def test_the_dialect_of_transformers(small_folder):
    template = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ {'a': '<b>'} | tojson }}{{ {'a': 1} | tojson(indent=2) }}"
    )
    text = with_template(small_folder, template).render_chat([{"role": "user", "content": "x"}] * 2)
    assert re.fullmatch(r'x\d{4}\{"a": "<b>"\}\{\n  "a": 1\n\}', text)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('No <|im_end|>: ' + messages[0].content) }}", "No <|im_end|>: hello"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safe"),
        ("{% for i in range(10**7) %}{% endfor %}", "ange"),
    ],
)
def test_what_a_template_refuses_is_a_request_error(small_folder, template, says):
    tokenizer = with_template(small_folder, template)
    with pytest.raises(RequestError, match=re.escape(says) if "|>" in says else says):
        tokenizer.apply_chat([{"role": "user", "content": "hello"}])


def test_data_that_is_no_json_is_refused(small):
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for bad, says in ((object(), "object"), (deep, "deeply"), ("\ud800", "surrogate")):
        with pytest.raises(RequestError, match=says):
            small.apply_chat([{"role": "user", "content": "a", "extra": bad}])


def test_private_characters_that_users_write_survive(small):
    text = "".join(map(chr, range(0xF0000, 0xF0100))) + "<think>"
    assert text in small.render_chat([{"role": "user", "content": text}])


def test_history_is_kept_newest_first(small):
    history = [("one", "1"), ("two", "2"), ("three", "3")]

    def chat(turns):
        messages = [{"role": "system", "content": "s"}]
        for user, answer in turns:
            messages += [
                {"role": "user", "content": user},
                {"role": "assistant", "content": answer},
            ]
        return messages

    query = {"role": "user", "content": "q"}
    window = len(small.apply_chat(chat(history[1:]), add_generation_prompt=False))
    for size, kept in ((10**6, 0), (window + 1, 1), (window, 2), (1, 3)):
        expected = small.apply_chat([*chat(history[kept:]), query])
        assert small.make_context("q", history, "s", size) == expected


def test_a_long_history_is_not_rendered_turn_by_turn(small, monkeypatch):
    calls, apply_chat = [], small.apply_chat
    monkeypatch.setattr(
        small, "apply_chat", lambda *args, **kw: calls.append(1) or apply_chat(*args, **kw)
    )
    small.make_context("q", [("one", "1")] * 500, "s", 10**6)
    assert len(calls) <= 12


def test_vocabulary(small, tmp_path):
    assert small.eos_token_ids == {small.special_tokens[t] for t in CONTROL[:3] if "end" in t}
    assert small.special_tokens.keys() >= set(CONTROL)
    assert small.hidden_ids == {small.special_tokens[t] for t in CONTROL[:3]}
    assert small.unused_ids == frozenset()
    backend = Backend(models.BPE(vocab={"a": 0, "▁": 5}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    gaps = load_tokenizer(tmp_path)
    real = {0, 5, gaps.special_tokens["<s>"]}
    assert gaps.vocab_size == 6
    assert gaps.decode([0, 5]) == "a▁"  # no byte-level token: its own text
    assert gaps.unused_ids == set(range(6)) - real
    assert gaps.prompt_prefix_ids == (gaps.special_tokens["<s>"],)
    for token in (*gaps.unused_ids, -1, 6, 2**40, "a"):
        with pytest.raises(RequestError, match="not in the vocabulary"):
            gaps.decode([token])


@pytest.mark.parametrize("run", ["a", " ", "!"])
def test_a_megabyte_of_one_character_is_encoded(small, run):
    assert small.decode(small.encode(run * 10**6)) == run * 10**6
