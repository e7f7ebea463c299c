"""Which JSON schemas can be enforced while an answer is written: the part that is kept exactly.

A grammar must never promise more than it keeps. So whatever cannot be enforced token by token is
refused by name, instead of being left out in silence. A grammar may be narrower than its schema:
properties come in the schema's order, and a pattern stands for the whole string.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from nybble.errors import RequestError
from nybble.schema.pattern import check_pattern, expanded

Schema = Mapping[str, Any]

# What a schema may hold: a grammar's compilation takes time for each of them. A limit (a length, a
# pattern, a multiple) takes more with its size, up to some size, once for each different one.
MAX_CHARACTERS, MAX_SUBSCHEMAS, MAX_DEPTH, MAX_SIZE = 65_536, 500, 64, 10_000
MAX_LIMITS, MOST_OF_ONE = 2_048, 128
MAX_EXCLUSIVE = 50  # alternatives of a oneOf, each of which is compared with each
MAX_MULTIPLE, MAX_INTEGER = 1_024, 2**53

FORMATS = frozenset(
    [
        "date",
        "time",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
        "uri-reference",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
    ]
)
_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$id",
        "$defs",
        "definitions",
        "discriminator",
    ]
)
_BOUNDS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
_SIZES = frozenset(["minItems", "maxItems", "minLength", "maxLength"])
_LIMITS = (("minLength", "maxLength"), ("pattern",), ("multipleOf",))
_KEYWORDS: dict[str, frozenset[str]] = {
    "object": frozenset(["properties", "required", "additionalProperties"]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "integer": _BOUNDS | {"multipleOf"},
    "number": _BOUNDS,
    "boolean": frozenset(),
    "null": frozenset(),
}
_KNOWN = frozenset().union(*_KEYWORDS.values()) | {"type"}
# Each of these says all of a schema, or else the rest would be forgotten.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")


class Budget:
    """What schemas that are enforced together have of what takes time to compile."""

    def __init__(self) -> None:
        self.parts = 0
        self.limits: dict[object, int] = {}  # and what each takes, in characters

    def add_part(self) -> None:
        self.parts += 1
        if self.parts > MAX_SUBSCHEMAS:
            raise RequestError(
                f"There are over {MAX_SUBSCHEMAS} parts to enforce at a time: simplify the "
                "schema, or offer fewer tools."
            )

    def add_limits(self, schema: Schema) -> None:
        for names in _LIMITS:
            limit = tuple((name, schema[name]) for name in names if name in schema)
            if limit:
                self.limits[limit] = min(max(_size(value) for _, value in limit), MOST_OF_ONE)
        if sum(self.limits.values()) > MAX_LIMITS:
            raise RequestError(
                "The different limits to enforce at a time (minLength, maxLength, pattern, "
                f"multipleOf) come to over {MAX_LIMITS:,} characters, {MOST_OF_ONE} at most for "
                "each: use the same for several parts, or leave some out."
            )


def _size(limit: str | int) -> int:
    return expanded(limit) if isinstance(limit, str) else limit


def check_schema(schema: object, budget: Budget | None = None) -> None:
    """RequestError, naming the place, unless `schema` can be enforced, and still has its place in
    the budget (None: one of its own).

    schema: as in JSON Schema 2020-12, of which OpenAI's structured output is a part. Formats
    are kept in their shape: "date" may be 2023-02-31.
    """
    try:
        size = len(json.dumps(schema, allow_nan=False))
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "The schema holds a lone surrogate, which no UTF-8 text can: take it out."
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"The schema is no JSON ({error}): give a JSON object.") from error
    if size > MAX_CHARACTERS:
        raise RequestError(
            f"The schema has {size:,} characters, and {MAX_CHARACTERS:,} are allowed: shorten it."
        )
    if not isinstance(schema, Mapping):
        raise RequestError(f"The schema is {schema!r}: give a JSON object.")
    _Checker(schema, budget or Budget()).check(schema, "schema")


class _Checker:
    """Walks through one schema. Each method takes a part of it and where that stands."""

    def __init__(self, root: Schema, budget: Budget) -> None:
        self._root = root
        self._budget = budget
        self._seen: set[int] = set()
        self._depth = 0

    def check(self, schema: object, where: str) -> None:
        if schema is True or id(schema) in self._seen:
            return
        if not isinstance(schema, Mapping):
            raise RequestError(f"{where} is {schema!r}, which accepts nothing: give an object.")
        self._seen.add(id(schema))
        self._budget.add_part()
        if self._depth == MAX_DEPTH:
            raise RequestError(f"The schema is nested deeper than {MAX_DEPTH}: flatten it.")
        self._depth += 1
        self._check_part(schema, where)
        self._depth -= 1

    def _check_part(self, schema: Schema, where: str) -> None:
        keywords = schema.keys() - _ANNOTATIONS
        alone = next((name for name in _ALONE if name in keywords), None)
        if alone is not None:
            _only(keywords, {alone}, where, f'beside "{alone}"')
            self._check_alone(alone, schema[alone], where)
        elif "enum" in keywords or "const" in keywords:
            _only(keywords, {"enum", "const", "type"}, where, 'beside "enum" or "const"')
            _check_values(schema, where)
        else:
            self._check_typed(schema, keywords, where)

    def _check_alone(self, name: str, value: object, where: str) -> None:
        where = f"{where}/{name}"
        if name == "$ref":
            self.check(self._target(value, where), f"{value}")
            return
        if not isinstance(value, list) or not value:
            raise RequestError(f"{where} is {value!r}: give a list of schemas.")
        if name == "allOf" and len(value) > 1:
            raise RequestError(
                f"{where} has several schemas, which cannot be enforced: merge them."
            )
        for index, part in enumerate(value):
            self.check(part, f"{where}/{index}")
        if name == "oneOf" and not self._exclusive(value):
            raise RequestError(
                f"{where} has alternatives that may hold at once, which cannot be excluded: use "
                "anyOf, or give each a property that tells it from the others."
            )

    def _target(self, pointer: object, where: str) -> object:
        """What a $ref points to, inside the schema."""
        target: Any = self._root
        steps = pointer.split("/") if isinstance(pointer, str) else [""]
        for step in steps[1:]:
            target = target.get(step) if isinstance(target, Mapping) else None
        if steps[0] != "#" or not isinstance(target, Mapping):
            raise RequestError(f'{where} is {pointer!r}, which is not there: use "#/$defs/NAME".')
        return target

    def _check_typed(self, schema: Schema, keywords: Iterable[str], where: str) -> None:
        unknown = sorted(set(keywords) - _KNOWN)
        if unknown:
            raise RequestError(
                f"{where}/{unknown[0]} cannot be enforced: leave it out, and say it in the prompt."
            )
        types = _types_of(schema, where)
        fitting = frozenset().union(*(_KEYWORDS[name] for name in types)) | {"type"}
        _only(keywords, fitting, where, f"where the type is {' or '.join(types) or 'not given'}")
        _check_combinations(schema, types, where)
        for name in _SIZES & set(keywords):
            _check_size(schema[name], f"{where}/{name}")
        for name in _BOUNDS & set(keywords):
            _check_bound(schema[name], "integer" in types, f"{where}/{name}")
        if "pattern" in keywords:
            check_pattern(schema["pattern"], f"{where}/pattern")
        self._budget.add_limits(schema)
        self._check_properties(schema, where)
        self._check_items(schema, where)

    def _check_properties(self, schema: Schema, where: str) -> None:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise RequestError(f"{where}/properties is {properties!r}: give an object of schemas.")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise RequestError(f"{where}/required is {required!r}: give a list of names.")
        missing = [name for name in required if name not in properties]
        if missing:
            raise RequestError(
                f"{where}/required names {missing[0]!r}, which is not among its properties: "
                "describe it there."
            )
        for name, part in properties.items():
            self.check(part, f"{where}/properties/{name}")
        if schema.get("additionalProperties", False) is not False:
            self.check(schema["additionalProperties"], f"{where}/additionalProperties")

    def _check_items(self, schema: Schema, where: str) -> None:
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise RequestError(f"{where}/prefixItems is {prefix!r}: give a list of schemas.")
        for index, part in enumerate(prefix):
            self.check(part, f"{where}/prefixItems/{index}")
        if schema.get("items", False) is not False:
            self.check(schema["items"], f"{where}/items")

    # -- oneOf ------------------------------------------------------------------------------------

    def _exclusive(self, alternatives: Sequence[object]) -> bool:
        if len(alternatives) > MAX_EXCLUSIVE:
            return False
        return all(self._disjoint(*pair) for pair in combinations(alternatives, 2))

    def _disjoint(self, left: object, right: object) -> bool:
        """Whether plainly nothing can be valid under both; both have been checked."""
        left, right = self._resolved(left), self._resolved(right)
        if not _possible_types(left) & _possible_types(right) or _differ(left, right):
            return True
        shared = set(left.get("required", ())) & set(right.get("required", ()))
        return any(
            _differ(*(self._resolved(part["properties"][name]) for part in (left, right)))
            for name in shared
        )

    def _resolved(self, schema: object) -> Schema:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"], "schema")
        return schema if isinstance(schema, Mapping) else {}


def _only(keywords: Iterable[str], allowed: Iterable[str], where: str, beside: str) -> None:
    others = sorted(set(keywords) - set(allowed))
    if others:
        raise RequestError(f"{where}/{others[0]} cannot be enforced {beside}: leave it out.")


def _types_of(schema: Schema, where: str) -> list[str]:
    """The types that a schema names, or those that its properties or items imply."""
    given = schema.get("type")
    if given is None:
        return [t for t in ("object", "array") if _KEYWORDS[t] & schema.keys()][:1]
    types = [given] if isinstance(given, str) else given
    known = (
        isinstance(types, list)
        and types
        and all(isinstance(t, str) and t in _KEYWORDS for t in types)
    )
    if not known:
        raise RequestError(f"{where}/type is {given!r}: use one of {', '.join(_KEYWORDS)}.")
    return list(types)


def _check_combinations(schema: Schema, types: Iterable[str], where: str) -> None:
    """Pairs of which a grammar would keep one only."""
    for name in ("format", "pattern"):
        if name in schema:
            others = (_KEYWORDS["string"] - {name}) & schema.keys()
            _only(others, (), where, f'beside "{name}"')
    if "format" in schema and str(schema["format"]) not in FORMATS:
        raise RequestError(
            f"{where}/format {schema['format']!r} cannot be enforced: use one of "
            f"{', '.join(sorted(FORMATS))}, or leave it out."
        )
    if "multipleOf" in schema:
        _only(_BOUNDS & schema.keys(), (), where, 'beside "multipleOf"')
        factor = schema["multipleOf"]
        if "number" in types or not _is_whole(factor) or not 1 <= factor <= MAX_MULTIPLE:
            raise RequestError(
                f"{where}/multipleOf {factor!r} cannot be enforced: use it for the type integer, "
                f"with a whole number from 1 to {MAX_MULTIPLE}."
            )


def _check_values(schema: Schema, where: str) -> None:
    if "enum" in schema and "const" in schema:
        raise RequestError(f'{where} has both "enum" and "const": keep one.')
    values = _constants(schema)
    if not isinstance(values, list) or not values:
        raise RequestError(f"{where}/enum is {values!r}: give a list of values.")
    if len(values) > MAX_SUBSCHEMAS:
        raise RequestError(f"{where}/enum has over {MAX_SUBSCHEMAS} values: shorten it.")
    if "type" in schema:
        named = _possible_types(schema)
        for value in values:
            if not _type_of(value) & named:
                raise RequestError(
                    f"{where} lists {value!r}, which is no {schema['type']}: fix it."
                )


def _check_size(value: Any, where: str) -> None:
    if not _is_whole(value) or not 0 <= value <= MAX_SIZE:
        raise RequestError(f"{where} is {value!r}: give a whole number from 0 to {MAX_SIZE:,}.")


def _check_bound(value: Any, whole: bool, where: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or abs(value) > MAX_INTEGER:
        raise RequestError(f"{where} is {value!r}: give a number between -2^53 and 2^53.")
    if whole and not _is_whole(value):
        raise RequestError(f"{where} is {value!r}: give a whole number, as the type is integer.")


# -- values and types ---------------------------------------------------------------------------


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _constants(schema: Schema) -> Any:
    """The values that a schema lists, None if it lists none."""
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _type_of(value: object) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    if isinstance(value, (int, float)):
        whole = isinstance(value, int) or value.is_integer()
        return {"integer", "number"} if whole else {"number"}
    if isinstance(value, str):
        return {"string"}
    return {"array" if isinstance(value, list) else "object"}


def _possible_types(schema: Schema) -> set[str]:
    """Types that may be valid: all if it is not plain. A number may be an integer."""
    if schema.keys() & {"anyOf", "oneOf", "allOf"}:
        return set(_KEYWORDS)
    if "type" not in schema and _constants(schema):
        return set().union(*map(_type_of, _constants(schema)))
    types = set(_types_of(schema, "schema")) or set(_KEYWORDS)
    return types | {"integer"} if "number" in types else types


def _differ(left: Schema, right: Schema) -> bool:
    """Whether both list their values and have none in common."""
    ours, theirs = _constants(left), _constants(right)
    return ours is not None and theirs is not None and _spelled(ours).isdisjoint(_spelled(theirs))


def _spelled(values: Iterable[object]) -> set[str]:
    """A text for each value; 2.0 has that of 2."""
    whole = (int(v) if "integer" in _type_of(v) else v for v in values)  # type: ignore[call-overload]
    return {json.dumps(value, sort_keys=True) for value in whole}
