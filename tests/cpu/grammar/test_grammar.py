"""Constrained answers of a model with random weights, judged by jsonschema."""

from __future__ import annotations

import json
import re
from contextlib import suppress

import jsonschema
import pytest
import torch
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.engine.constraint import allowed_tokens
from nybble.errors import RequestError
from nybble.grammar import GrammarCompiler
from nybble.llm import LLM
from nybble.sampling import SamplingParams
from nybble.schema import FORMATS, check_schema
from nybble.tools import HermesFormat, ReActFormat, Tool

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = toy.write_llama(tmp_path_factory.mktemp("toy"), max_position_embeddings=2048)
    return LLM(folder, dtype="float32", threads=1)


@pytest.fixture(scope="module")
def compiler(llm):
    return GrammarCompiler(llm.tokenizer, llm.engine.eos_ids, llm.engine.vocab_size)


def answer(llm, grammar, seed=0, max_tokens=150, temperature=1.0):
    """(text, finish_reason) of the toy model under a grammar.

    Random weights would close a string or a bracket once in 300 tokens: they are helped to.
    """
    closing = {llm.tokenizer.encode(text)[0]: 6.0 for text in '"]}'}
    params = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, logit_bias=closing
    )
    generation = llm.engine.generate([5, 6, 7], params, grammar.constraint())
    text = llm.tokenizer.decode(list(generation))
    return text, generation.finish_reason


def follow(grammar, tokenizer, text):
    """Whether an answer may be exactly `text`."""
    constraint = grammar.constraint()
    for token in tokenizer.encode(text):
        if not constraint.accept(token):
            return False
    end = next(iter(tokenizer.eos_token_ids))
    return bool(allowed_tokens([constraint], tokenizer.vocab_size, CPU)[0, end])


# -- schemas ---------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": "string"}),
    st.just({"type": "number"}),
    st.builds(
        lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
        st.integers(0, 5),
        st.integers(0, 5),
    ),
    st.builds(
        lambda kind, low, more: {"type": kind, "minimum": low, "maximum": low + more},
        st.sampled_from(["integer", "number"]),
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.integers(1, 30).map(lambda n: {"type": "integer", "multipleOf": n}),
    st.sampled_from(["^[a-c]+$", r"^\d{2,4}(?:-x)?$", "yes|no", r'^[^"\\]{1,5}\.$']).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "uuid", "ipv4", "email"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    st.lists(
        st.one_of(st.text(max_size=4), st.integers(-9, 9), st.none()), min_size=1, max_size=3
    ).map(lambda values: {"enum": values}),
)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=5)


def objects(parts):
    @st.composite
    def draw_object(draw):
        properties = draw(st.dictionaries(NAMES, parts, max_size=3))
        required = [name for name in properties if draw(st.booleans())]
        closed = draw(st.sampled_from([{"additionalProperties": False}, {}]))
        return {"type": "object", "properties": properties, "required": required, **closed}

    return draw_object()


def containers(parts):
    return st.one_of(
        objects(parts),
        st.builds(
            lambda items, low, more: {
                "type": "array", "items": items, "minItems": low, "maxItems": low + more
            },
            parts,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(parts, min_size=1, max_size=2).map(
            lambda items: {"type": "array", "prefixItems": items, "items": False}
        ),
        st.lists(parts, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    )  # fmt: skip


SCHEMAS = st.recursive(SCALARS, containers, max_leaves=5)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(schema=SCHEMAS, strict=st.booleans(), seed=st.integers(0, 2**20))
def test_whatever_ends_is_valid(llm, compiler, schema, strict, seed):
    text, reason = answer(llm, compiler.json_schema(schema, strict), seed)
    assert reason in ("stop", "length")
    if reason == "stop":
        jsonschema.validate(json.loads(text), schema)


# Anything that clients may send as a schema, much of it nonsense.
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3),
    st.sampled_from(["string", "object", "#", "#/$defs/a", "date", 10**400]),
)  # fmt: skip
KEYWORDS = st.sampled_from(
    ["type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems",
     "maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "multipleOf",
     "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "not", "a"]
)  # fmt: skip
NONSENSE = st.dictionaries(
    KEYWORDS,
    st.recursive(
        VALUES,
        lambda parts: st.lists(parts, max_size=3) | st.dictionaries(KEYWORDS, parts, max_size=4),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(schema=st.one_of(NONSENSE, SCHEMAS.flatmap(lambda s: NONSENSE.map(lambda n: {**s, **n}))))
def test_a_schema_is_enforced_or_refused(compiler, schema):
    with suppress(RequestError):
        compiler.json_schema(schema)


ATOMS = st.sampled_from(
    [*"abc1 _-.^$|*+?()[]{},\\", "[a-c]", "[^a]", "(?:", "(a|b)", "{2}", "{0,3}", r"\d", r"\w"]
)


@settings(max_examples=120, deadline=None)
@given(pattern=st.lists(ATOMS, min_size=1, max_size=8).map("".join), seed=st.integers(0, 99))
def test_a_pattern_is_kept_or_refused(llm, compiler, pattern, seed):
    try:
        grammar = compiler.json_schema({"type": "string", "pattern": pattern})
        text, reason = answer(llm, grammar, seed, max_tokens=40)
    except RequestError:
        return
    if reason == "stop":
        assert re.search(pattern, json.loads(text))


@pytest.mark.parametrize("text", ["péché", "\x80012", "a\\xe9b", '[^"\\\r\n]', "中文\U0001f600"])
def test_names_and_constants_of_any_alphabet(llm, compiler, text):
    schema = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
    written, reason = answer(llm, compiler.json_schema(schema, strict=True))
    assert (json.loads(written), reason) == ({text: text}, "stop")


def test_strings_of_limited_length_hold_no_control_characters(llm, compiler):
    constraint = compiler.json_schema({"type": "string", "maxLength": 9}).constraint()
    constraint.accept(llm.tokenizer.encode('"')[0])
    allowed = allowed_tokens([constraint], llm.tokenizer.vocab_size, CPU)[0]
    assert allowed[llm.tokenizer.encode("a")[0]]
    for code in range(0x20):
        assert not allowed[llm.tokenizer.encode(chr(code))[0]]


def may_begin(grammar, tokenizer, data):
    """Whether an answer may begin with these bytes, a token each."""
    known = set(range(tokenizer.vocab_size)) - tokenizer.hidden_ids - tokenizer.unused_ids
    ids = {tokenizer.decode_bytes([i]): i for i in known}
    constraint = grammar.constraint()
    for token in (ids[bytes([byte])] for byte in data):
        if not allowed_tokens([constraint], tokenizer.vocab_size, CPU)[0, token]:
            return False
        assert constraint.accept(token)
    return True


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[^a]+$"},
        {"enum": ["[^\ud7ff", '"]', "[^"]},
    ],
)
def test_no_answer_holds_bytes_that_are_no_text(llm, compiler, schema):
    """Decoded, the three bytes of a surrogate are three characters: too many, or others."""
    grammar = compiler.json_schema(schema)
    texts = schema.get("enum", ["\ud7ff", "\ue000", "[^b]"])
    for text in texts:
        whole = json.dumps(text, ensure_ascii=False).encode()
        assert may_begin(grammar, llm.tokenizer, whole)
    assert not may_begin(grammar, llm.tokenizer, b'"\xed\xa0\x80')


def test_answers_do_end(llm, compiler):
    """The property above is not empty."""
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
            "ok": {"type": "boolean"},
            "of": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["n", "ok", "of"],
        "additionalProperties": False,
    }
    grammar = compiler.json_schema(schema)
    answers = [answer(llm, grammar, seed) for seed in range(12)]
    assert [reason for _, reason in answers].count("stop") >= 10
    texts = {text for text, _ in answers}
    assert len(texts) > 3
    for text, reason in answers:
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema)


def test_greedy_answers_too_and_max_tokens_cuts(llm, compiler):
    grammar = compiler.json_schema({"type": "string", "minLength": 50, "maxLength": 60})
    text, reason = answer(llm, grammar, temperature=0)
    assert reason == "stop"
    assert 50 <= len(json.loads(text)) <= 60
    assert answer(llm, grammar, max_tokens=7)[1] == "length"


def test_a_json_object(llm, compiler):
    grammar = compiler.json_schema({"type": "object"})
    ends = [answer(llm, grammar, seed, 300) for seed in range(8)]
    assert all(text.startswith("{") for text, _ in ends)
    assert all(isinstance(json.loads(text), dict) for text, reason in ends if reason == "stop")
    assert follow(grammar, llm.tokenizer, '{"a": [1, {"b": null}]}')
    assert not follow(grammar, llm.tokenizer, "[1]")


def test_white_space_has_an_end(llm, compiler):
    grammar = compiler.json_schema({"type": "object", "properties": {"a": {}}, "required": ["a"]})
    assert follow(grammar, llm.tokenizer, '{\n    "a": 1\n}')
    assert not follow(grammar, llm.tokenizer, "{" + " " * 40 + '"a": 1}')


def test_strict_means_no_other_properties(llm, compiler):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    loose, strict = compiler.json_schema(schema), compiler.json_schema(schema, strict=True)
    extra = '{"a": 1, "b": 2}'
    assert follow(loose, llm.tokenizer, extra)
    assert not follow(strict, llm.tokenizer, extra)
    assert follow(strict, llm.tokenizer, '{"a": 1}')


def test_recursion(llm, compiler):
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    grammar = compiler.json_schema({"$ref": "#/$defs/node", "$defs": {"node": node}}, strict=True)
    assert follow(grammar, llm.tokenizer, '{"next": {"next": {}}}')
    assert not follow(grammar, llm.tokenizer, '{"next": {"next": []}}')


BAD_SHAPES = {
    "date": "2020-13-01x",
    "time": "25",
    "date-time": "today",
    "duration": "1 day",
    "email": "a b",
    "hostname": "a b",
    "ipv4": "1.2.3",
    "ipv6": "xyz",
    "uuid": "12",
    "uri": "a b",
    "uri-reference": "a b",
    "uri-template": "{",
    "json-pointer": "a",
    "relative-json-pointer": "a",
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_each_format_has_a_shape(llm, compiler, name):
    grammar = compiler.json_schema({"type": "string", "format": name})
    assert not follow(grammar, llm.tokenizer, json.dumps(BAD_SHAPES[name]))


def test_unsatisfiable_schemas_are_refused_or_end_alone(llm, compiler):
    with pytest.raises(RequestError, match=r"cannot be enforced \(.*\): change"):
        compiler.json_schema({"type": "integer", "minimum": 3, "maximum": 1})
    endless = compiler.json_schema({"$ref": "#"})
    with pytest.raises(RequestError, match="loosen the schema"):
        answer(llm, endless)


def test_two_answers_follow_one_grammar_apart(llm, compiler):
    grammar = compiler.json_schema({"enum": ["one", "two"]})
    first, second = grammar.constraint(), grammar.constraint()
    for token in llm.tokenizer.encode('"one"'):
        assert first.accept(token)
    for token in llm.tokenizer.encode('"two"'):
        assert second.accept(token)


def test_control_tokens_are_never_part_of_an_answer(llm, compiler):
    constraint = compiler.json_schema({"type": "string"}).constraint()
    constraint.accept(llm.tokenizer.encode('"')[0])
    allowed = allowed_tokens([constraint], llm.tokenizer.vocab_size, CPU)[0]
    assert allowed.sum() > 100
    assert not any(allowed[token] for token in llm.tokenizer.special_tokens.values())


# -- tool calls ------------------------------------------------------------------------------------

POINT = {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "y": {"type": "boolean"}}
TOOLS = [
    Tool(
        "move",
        "Moves.",
        {"type": "object", "properties": POINT, "required": ["x", "y"]},
        strict=True,
    ),
    Tool("stop"),
]


@pytest.mark.parametrize("tool_format", [HermesFormat(), ReActFormat()], ids=["hermes", "react"])
@pytest.mark.parametrize("resumed", [False, True])
def test_forced_calls_are_calls(llm, compiler, tool_format, resumed):
    """Random weights call a tool, and what they say is read as the call that it is."""
    grammar = compiler.structure(tool_format.forced(TOOLS, resumed=resumed, many=False))
    ended = 0
    for seed in range(6):
        text, reason = answer(llm, grammar, seed, max_tokens=400)
        parser = tool_format.parser(TOOLS, resumed=resumed)
        calls = [d for d in [*parser.push(text), *parser.finish()] if hasattr(d, "sound")]
        if reason == "stop":
            ended += 1
            assert [call.sound for call in calls] == [True]
    assert ended >= 3


def test_many_calls_where_many_may_be(llm, compiler):
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    for many in (True, False):
        grammar = compiler.structure(HermesFormat().forced(TOOLS, resumed=False, many=many))
        assert follow(grammar, llm.tokenizer, call)
        assert follow(grammar, llm.tokenizer, f"{call}\n{call}") == many
        assert not follow(grammar, llm.tokenizer, "No.")


def test_strict_tools_are_held_to_their_schemas_only_when_called(llm, compiler):
    grammar = compiler.structure(HermesFormat().guarded(TOOLS))
    begin = 'Well.\n<tool_call>\n{"name": "move", "arguments": '
    assert follow(grammar, llm.tokenizer, "No tool.")
    assert follow(grammar, llm.tokenizer, begin + '{"x": 1, "y": true}}\n</tool_call>')
    assert not follow(grammar, llm.tokenizer, begin + '{"x": 99, "y": true}}\n</tool_call>')
    loose = begin.replace("move", "stop")
    assert follow(grammar, llm.tokenizer, loose + '{"anything": 1}}\n</tool_call>')
    grammar = compiler.structure(ReActFormat().guarded(TOOLS))
    begin = "Thought: Go.\nAction: move\nAction Input: "
    assert follow(grammar, llm.tokenizer, begin + '{"x": 1, "y": true}')
    assert not follow(grammar, llm.tokenizer, begin + '{"x": 99, "y": true}')
    assert follow(grammar, llm.tokenizer, "Thought: None.\nFinal Answer: no")


def test_references_inside_a_tools_schema(llm, compiler):
    schema = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/p"}},
        "required": ["p"],
        "$defs": {"p": {"type": "object", "properties": POINT, "required": ["x"]}},
    }
    check_schema(schema)
    layout = HermesFormat().forced([Tool("f", "", schema)], resumed=False, many=False)
    grammar = compiler.structure(layout)
    begin = '<tool_call>\n{"name": "f", "arguments": '
    assert follow(grammar, llm.tokenizer, begin + '{"p": {"x": 1}}}\n</tool_call>')
    assert not follow(grammar, llm.tokenizer, begin + '{"p": {}}}\n</tool_call>')
