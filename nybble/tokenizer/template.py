"""A checkpoint's Jinja chat template, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nybble.errors import CheckpointError, RequestError
from nybble.tokenizer.base import Message
from nybble.tokenizer.usertext import Marking, UserText, strings_in

# A template may build control tokens out of these: "<|" + role + "|>". Other roles are users' text.
KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

_TEMPLATE_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class Rendering:
    """A rendered chat: its text, in which the characters that users wrote are marked.

    Whoever looks for control tokens in `marked` finds those of the template only.
    """

    def __init__(self, marked: str, marking: Marking) -> None:
        self.marked = marked
        self._marking = marking

    @property
    def text(self) -> str:
        return self.plain(self.marked)

    def plain(self, part: str) -> str:
        """A part of `marked` as the text that people read."""
        return self._marking.unmark(part)


class ChatTemplate:
    """One Jinja chat template, in the dialect of Hugging Face's Transformers.

    Args:
        source: the template.
        control_tokens: what users' text must never spell in the eyes of the tokenizer.
        variables: names that the template may use beside the messages, such as bos_token.

    Raises:
        CheckpointError: the template is no valid Jinja.
    """

    def __init__(
        self, source: str, control_tokens: Iterable[str], variables: Mapping[str, str]
    ) -> None:
        self._source = source
        self._control_tokens = tuple(control_tokens)
        self._variables = dict(variables)
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"The chat template is no valid Jinja (line {error.lineno}: {error.message}): "
                "fetch the checkpoint's tokenizer files again."
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> Rendering:
        """The chat as text.

        Raises:
            RequestError: what the template itself refuses or cannot work with.
        """
        values = {"documents": None, **template_kwargs, "tools": tools, "messages": messages}
        try:
            marking = Marking(self._control_tokens, self._seen(values))
            marked = {name: marking.mark_all(value) for name, value in values.items()}
        except RecursionError as error:
            raise RequestError("The chat's data is nested too deeply: flatten it.") from error
        marked["messages"] = [_with_known_role(m, marking) for m in marked["messages"]]
        variables = {**self._variables, **marked, "add_generation_prompt": add_generation_prompt}
        try:
            return Rendering(self._template.render(variables), marking)
        except _TEMPLATE_FAULTS as error:
            raise RequestError(
                f"The chat template refuses this chat ({marking.unmark(str(error))}): change the "
                "messages to what the model's card describes."
            ) from error

    def _seen(self, values: Mapping[str, Any]) -> list[str]:
        return [self._source, *self._variables.values(), *strings_in(values)]


def _with_known_role(message: dict[Any, Any], marking: Marking) -> dict[Any, Any]:
    role = marking.unmark(message["role"])
    return {**message, "role": role} if role in KNOWN_ROLES else message


class _Environment(ImmutableSandboxedEnvironment):
    """What a macro or method makes out of users' text goes on answering as the plain text."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        result = super().call(context, obj, *args, **kwargs)
        if type(result) is not str:
            return result
        texts = (a for a in (*args, *kwargs.values()) if isinstance(a, UserText))
        user_text = next(texts, None)
        return result if user_text is None else UserText(result, user_text.marking)


class _GenerationBlock(Extension):
    """`{% generation %}` marks what a trainer learns from; rendering takes its body as it is."""

    tags = {"generation"}  # noqa: RUF012  # the name and type that Jinja prescribes

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes, marked as a whole if there is users' text in it."""
    marking = next((s.marking for s in strings_in(value) if isinstance(s, UserText)), None)
    text = json.dumps(
        value if marking is None else marking.unmark_all(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return text if marking is None else marking.mark(text)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
