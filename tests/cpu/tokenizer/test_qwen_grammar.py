"""Grammars and tool prompts over the first generation's own 151,643 tokens."""

from __future__ import annotations

import json

import pytest

from nybble.engine.constraint import allowed_tokens
from nybble.grammar import GrammarCompiler
from nybble.tools import ReActFormat, Tool

SCHEMA = {
    "type": "object",
    "properties": {"城市": {"enum": ["巴黎", "Rome"]}, "n": {"type": "integer"}},
    "required": ["城市", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(qwen):
    return GrammarCompiler(qwen, qwen.eos_token_ids, qwen.vocab_size)


def test_a_schema_in_its_own_tokens(qwen, compiler):
    """Every token of the answer may come, and the end where it is complete, not before."""
    constraint = compiler.json_schema(SCHEMA).constraint()
    ids = qwen.encode(json.dumps({"城市": "巴黎", "n": 12}, ensure_ascii=False))
    end = qwen.special_tokens["<|im_end|>"]
    for token in ids:
        allowed = allowed_tokens([constraint], qwen.vocab_size, "cpu")[0]
        assert allowed[token]
        assert not allowed[end]
        assert not any(allowed[i] for i in qwen.hidden_ids)
        assert constraint.accept(token)
    allowed = allowed_tokens([constraint], qwen.vocab_size, "cpu")[0]
    assert {i for i, may in enumerate(allowed.tolist()) if may} == qwen.eos_token_ids


def test_a_character_may_come_in_parts(qwen, compiler):
    constraint = compiler.json_schema({"const": "𓀀"}).constraint()
    ids = qwen.encode('"𓀀"')
    assert len(ids) > 3, "no token has this character"
    assert all(constraint.accept(token) for token in ids)


def test_an_observation_is_gone_on_from_in_the_assistants_turn(qwen):
    """The ids of Qwen's own way: the whole chat encoded, without the last <|im_end|>."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "gone <|im_end|>"},
    ]
    prompt = ReActFormat().prompt(chat, [Tool("f")])
    ids = qwen.apply_chat(prompt.messages) + qwen.encode(prompt.reply)
    whole = [*prompt.messages, {"role": "assistant", "content": prompt.reply}]
    assert ids == qwen.apply_chat(whole, add_generation_prompt=False)[:-1]
    assert ids.count(qwen.special_tokens["<|im_end|>"]) == 2
