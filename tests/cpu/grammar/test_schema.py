"""What can be enforced is let through, and everything else is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nybble.errors import RequestError
from nybble.schema import MAX_DEPTH, MAX_LIMITS, MAX_SUBSCHEMAS, Budget, check_schema
from nybble.schema.check import _KEYWORDS

TEXT = {"type": "string"}
PERSON = {
    "title": "Person",
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "The name.", "maxLength": 40},
        "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
        "kind": {"enum": ["a", 1, None]},
        "tags": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
        "pair": {"type": "array", "prefixItems": [TEXT, {"const": 2}], "items": False},
        "friend": {"$ref": "#/$defs/friend"},
        "code": {"type": "string", "pattern": r"^[A-Z]{2}-\d+$"},
        "day": {"type": "string", "format": "date"},
        "any": {},
        "more": True,
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"friend": {"type": ["object", "null"], "properties": {"of": {"$ref": "#"}}}},
}


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {},
        {"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": TEXT}},
        {"oneOf": [TEXT, {"type": "number"}]},
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": {"type": kind}},
                    "required": ["kind"],
                }
                for kind in ("string", "integer")
            ],
            "discriminator": {"propertyName": "kind"},
        },
        {"type": "integer", "multipleOf": 5},
        {"type": "string", "enum": ["a", "b"]},
        {"type": ["integer", "string"], "minimum": 3, "maxLength": 2},
        {"properties": {"a": TEXT}},
        {"type": "string", "pattern": r"(?:a|b)[^\"\\]*\.\u4e2d"},
        {"type": "string", "pattern": r"^[\w.+-]{1,60}@[^\s@]+$"},
        {"type": "string", "pattern": "^[ -~]{0,100}$"},
    ],
    ids=str,
)
def test_what_can_be_enforced(schema):
    assert parts(schema) >= 1


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": TEXT}, "schema/not cannot be enforced"),
        ({"type": "array", "uniqueItems": True}, "schema/uniqueItems"),
        ({"type": "array", "contains": TEXT}, "schema/contains"),
        ({"type": "object", "patternProperties": {"a": TEXT}}, "schema/patternProperties"),
        ({"type": "object", "minProperties": 1}, "schema/minProperties"),
        ({"if": TEXT, "then": TEXT}, "schema/if"),
        ({"type": "object", "nullable": True}, "schema/nullable"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "schema/properties/a/not"),
        ({"type": "array", "items": {"type": "tuple"}}, "schema/items/type is 'tuple'"),
        ({"type": []}, "schema/type"),
        ({"minimum": 3}, "schema/minimum cannot be enforced where the type is not given"),
        ({"type": "string", "minimum": 3}, "minimum cannot be enforced where the type is string"),
        ({"$ref": "#/$defs/x", "minLength": 2, "$defs": {"x": TEXT}}, 'beside "\\$ref"'),
        ({"$ref": "#/$defs/y", "$defs": {"x": TEXT}}, "'#/\\$defs/y', which is not there"),
        ({"$ref": "https://example.org/x"}, "which is not there"),
        ({"anyOf": [TEXT], "type": "string"}, 'schema/type cannot be enforced beside "anyOf"'),
        ({"anyOf": []}, "give a list of schemas"),
        ({"allOf": [TEXT, {"maxLength": 3}]}, "merge them"),
        ({"oneOf": [TEXT, {"type": ["string", "null"]}]}, "may hold at once"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may hold at once"),
        ({"oneOf": [{"enum": [1, 2]}, {"const": 2.0}]}, "may hold at once"),
        ({"type": "string", "enum": ["a", 1]}, "lists 1, which is no string"),
        ({"enum": []}, "give a list of values"),
        ({"enum": ["a"], "maxLength": 3}, 'schema/maxLength cannot be enforced beside "enum"'),
        ({"type": "object", "required": ["a"]}, "names 'a', which is not among its properties"),
        ({"type": "object", "properties": {"a": False}}, "schema/properties/a is False"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, 'beside "pattern"'),
        ({"type": "string", "format": "date", "pattern": "a"}, 'beside "format"'),
        ({"type": "string", "format": "binary"}, "schema/format 'binary' cannot be enforced"),
        ({"type": "number", "multipleOf": 5}, "multipleOf cannot be enforced"),
        ({"type": "integer", "multipleOf": 2.5}, "schema/multipleOf 2.5"),
        ({"type": "integer", "multipleOf": 5, "minimum": 3}, 'beside "multipleOf"'),
        ({"type": "integer", "minimum": 1.5}, "give a whole number"),
        ({"type": "number", "minimum": 1e300}, "give a number between"),
        ({"type": "string", "minLength": -1}, "give a whole number from 0"),
        ({"type": "string", "maxLength": 10**6}, "give a whole number from 0"),
        ([], "give a JSON object"),
        ({"enum": ["\ud800"]}, "lone surrogate, which no UTF-8 text can: take it out"),
        ({"type": "number", "minimum": float("nan")}, "is no JSON"),
    ],
    ids=str,
)
def test_what_cannot(schema, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        check_schema(schema)
    assert re.search(r": [a-z].*\.$", str(caught.value)), "it says what to do"


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)b",
        "(?<!a)b",
        "(?P<n>a)",
        "(?i)a",
        r"\bword\b",
        r"(a)\1",
        r"\p{L}",
        r"\n",
        r"\x0a",
        "a\tb",
        "a^b",
        "a$|b",
        "a{129}",
        "(?:ab{1,9}){1,20}",
        "((a{10}){10}){2}",
        "",
        "a" * 501,
        '"',
        r"\\",
        r"\x22",
        r"[\\a]",
        "[[]",
        "[]",
        "a{",
        "*a",
        "a**",
        "(a",
    ],
)
def test_patterns_that_no_grammar_keeps(pattern):
    with pytest.raises(RequestError, match="schema/pattern"):
        check_schema({"type": "string", "pattern": pattern})


def test_the_docs_name_what_is_enforced():
    text = (Path(__file__).parents[3] / "docs" / "tools.md").read_text()
    listed = text.split("Enforced are")[1].split("Everything else")[0]
    alone = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const", "type"}
    assert set(re.findall(r"`([^`]+)`", listed)) == alone.union(*_KEYWORDS.values())


def parts(schema):
    budget = Budget()
    check_schema(schema, budget)
    return budget.parts


def nested(depth):
    schema = TEXT
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def to(index):
    return {"type": "object", "properties": {"next": {"$ref": f"#/$defs/d{index}"}}}


def test_limits():
    assert parts(nested(MAX_DEPTH - 1)) == MAX_DEPTH
    for huge in (
        nested(MAX_DEPTH + 1),
        nested(5000),
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(500)}},
        {"enum": list(range(MAX_SUBSCHEMAS + 1))},
        {"description": "x" * 70_000},
        {"$ref": "#/$defs/d0", "$defs": {f"d{i}": to(i + 1) for i in range(240)}},
        {"oneOf": [{"const": i} for i in range(100)]},
    ):
        with pytest.raises(RequestError):
            check_schema(huge)


@pytest.mark.parametrize(
    "limit",
    [
        lambda size: {"type": "string", "maxLength": size},
        lambda size: {"type": "string", "minLength": 1, "maxLength": size},
        lambda size: {"type": "string", "pattern": f"a{{{size}}}"},
        lambda size: {"type": "integer", "multipleOf": size},
    ],
)
def test_each_different_limit_takes_time_to_compile(limit):
    some, others = range(33, 65), (122, 123, 124, 127)
    assert sum(some) + sum(others) == MAX_LIMITS

    def tuples(*sizes):
        return {"type": "array", "prefixItems": [limit(size) for size in sizes]}

    budget = Budget()
    for _ in range(3):
        check_schema(tuples(*some), budget)
    check_schema(tuples(*others), budget)
    with pytest.raises(RequestError, match="use the same for several"):
        check_schema(limit(2), budget)  # as another tool's, beside the others
    check_schema(limit(2))


def test_a_large_limit_takes_no_more_than_a_middling_one():
    fields = {f"p{i}": {"type": "string", "maxLength": 1000 + i} for i in range(16)}
    check_schema({"type": "object", "properties": fields})
    fields["more"] = {"type": "string", "maxLength": 1}
    with pytest.raises(RequestError, match="use the same for several"):
        check_schema({"type": "object", "properties": fields})
