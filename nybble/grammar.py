"""Grammars that an answer must follow, over one tokenizer's vocabulary: JSON, schemas, tool calls.

xgrammar (Dong et al. 2024) compiles them and follows them; it is imported when the first one is
asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from nybble.engine.constraint import WORD_BITS
from nybble.errors import ConfigError, RequestError
from nybble.schema import check_schema
from nybble.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

# White space between two parts of JSON: enough to indent, and no way to fill the context with it.
MAX_WHITESPACE = 32
# In strings of limited length, xgrammar 0.2 lets control characters stand, which no JSON may.
_LENGTH_CLASS, _STRING_CLASS = r"[^\"\\\r\n]", r"[^\0-\x1f\"\\\r\n]"
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|.)")
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
_CACHE_BYTES = 2**26
_SOURCE = re.compile(r"^(\[[\d:]+\] \S+?:\d+: )+")


class Surrogates:
    """Keeps answers UTF-8: xgrammar takes the three bytes of a surrogate for a character.

    vocabulary: the bytes of each token, none of which holds a whole surrogate. openers end with
    the first byte of one; allowed: the bit mask of what does not go on as one.
    """

    def __init__(self, vocabulary: Sequence[bytes], vocab_size: int) -> None:
        self.openers = {i for i, token in enumerate(vocabulary) if token.endswith(b"\xed")}
        closers = [i for i, token in enumerate(vocabulary) if b"\xa0" <= token[:1] <= b"\xbf"]
        bits = torch.ones(-(-vocab_size // WORD_BITS), WORD_BITS, dtype=torch.int64)
        bits.view(-1)[closers] = 0
        self.allowed = (bits << torch.arange(WORD_BITS)).sum(1).to(torch.int32)


class Grammar:
    """A compiled grammar. Any number of answers may follow it at a time."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, surrogates: Surrogates) -> None:
        self._compiled, self._surrogates = compiled, surrogates

    def constraint(self) -> GrammarConstraint:
        """The engine's Constraint for one new request."""
        import xgrammar

        return GrammarConstraint(xgrammar.GrammarMatcher(self._compiled), self._surrogates)


class GrammarConstraint:
    """One answer's way through a grammar."""

    def __init__(self, matcher: xgrammar.GrammarMatcher, surrogates: Surrogates) -> None:
        self._matcher, self._surrogates = matcher, surrogates
        self._opened = False

    def fill(self, words: torch.Tensor) -> None:
        words.fill_(-1)  # xgrammar writes nothing where everything is allowed
        self._matcher.fill_next_token_bitmask(words)
        if self._opened:
            words &= self._surrogates.allowed

    def accept(self, token: int) -> bool:
        good = self._matcher.accept_token(token)
        if good:
            self._opened = token in self._surrogates.openers
        return good


class GrammarCompiler:
    """Compiles grammars for answers in the ids below `vocab_size`, which end with a stop id.

    The methods take milliseconds to seconds: call them in a thread beside an event loop. Any
    number of threads may do so. They raise a RequestError for what cannot be enforced.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = sorted(token for token in stop_ids if token < vocab_size)
        self._vocab_size = vocab_size

    def json_schema(self, schema: Mapping[str, Any], strict: bool = False) -> Grammar:
        """JSON that is valid under `schema`.

        strict: objects have no other properties than those that the schema names, unless it
        says so with additionalProperties.
        """
        check_schema(schema)
        compiler = self._compiler  # says what is missing, before xgrammar is needed
        try:
            compiled = compiler.compile_grammar(_json_grammar(schema, strict))
            return Grammar(compiled, self._surrogates)
        except RuntimeError as error:
            raise _refused(error) from error

    def structure(self, layout: Mapping[str, Any]) -> Grammar:
        """Text with JSON in it: `layout` is the format of an xgrammar structural tag.

        Its parts {"type": "json_schema", "json_schema": ...} are strict; their schemas are to be
        checked before (`check_schema`).
        """
        compiler = self._compiler
        try:
            tag = {"type": "structural_tag", "format": _with_grammars(layout)}
            return Grammar(compiler.compile_structural_tag(tag), self._surrogates)
        except RuntimeError as error:
            raise _refused(error) from error

    @cached_property
    def _compiler(self) -> xgrammar.GrammarCompiler:
        try:
            import xgrammar
        except ImportError as error:
            raise ConfigError(
                "Structured output needs xgrammar, which is not installed: run "
                "`pip install '.[serve]'` in nybble's folder."
            ) from error
        if not self._stop_ids:
            raise RequestError("This model has no token that ends an answer: ask without a schema.")
        info = xgrammar.TokenizerInfo(
            self._vocabulary, vocab_size=self._vocab_size, stop_token_ids=self._stop_ids
        )
        threads = min(8, os.cpu_count() or 1)
        return xgrammar.GrammarCompiler(info, max_threads=threads, cache_limit_bytes=_CACHE_BYTES)

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        """The bytes of each token; what no text contains, as control tokens, has none."""
        tokenizer = self._tokenizer
        silent = tokenizer.hidden_ids | tokenizer.unused_ids
        ids = range(min(self._vocab_size, tokenizer.vocab_size))
        tokens = (b"" if i in silent else tokenizer.decode_bytes([i]) for i in ids)
        return [b"" if _SURROGATE.search(token) else token for token in tokens]

    @cached_property
    def _surrogates(self) -> Surrogates:
        return Surrogates(self._vocabulary, self._vocab_size)


def _json_grammar(schema: Mapping[str, Any], strict: bool) -> str:
    """A schema as EBNF."""
    import xgrammar

    grammar = xgrammar.Grammar.from_json_schema(
        json.dumps(schema), strict_mode=strict, max_whitespace_cnt=MAX_WHITESPACE
    )
    printed = _ESCAPE.sub(_of_fixed_length, str(grammar))
    return printed.replace(_LENGTH_CLASS, _STRING_CLASS)


def _of_fixed_length(escape: re.Match[str]) -> str:
    """What xgrammar prints as \\xe9, it would read with the hexadecimal digits behind it."""
    return f"\\u00{escape[1]}" if escape[1] else escape[0]


def _with_grammars(layout: Any) -> Any:
    """The layout with its schemas as EBNF."""
    if isinstance(layout, list):
        return [_with_grammars(part) for part in layout]
    if not isinstance(layout, Mapping):
        return layout
    if layout.get("type") == "json_schema":
        return {"type": "grammar", "grammar": _json_grammar(layout["json_schema"], strict=True)}
    return {key: _with_grammars(part) for key, part in layout.items()}


def _refused(error: RuntimeError) -> RequestError:
    reason = _SOURCE.sub("", str(error)).strip().rstrip(".")
    return RequestError(f"The schema cannot be enforced ({reason}): change that part of it.")
