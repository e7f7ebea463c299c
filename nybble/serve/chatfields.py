"""What chats are made of: messages, tools, and the form of the answer. As OpenAI spells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from nybble.serve.body import Body, Many
from nybble.serve.errors import refused, unsupported

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
MOST_TOOLS = 128


class TextPart(Body):
    type: Literal["text"]
    text: str


_PARTS = TypeAdapter(Many[TextPart])


class CalledFunction(Body):
    name: FunctionName
    arguments: str = Field(description="The text of a JSON object.")


class MadeCall(Body):
    """A call that the assistant has made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message. developer is another name for system.

    function and function_call are the names that tool and tool_calls had at first: a function's
    answer follows its call, so the name is enough to tell which.
    """

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] = ""
    tool_calls: Annotated[Many[MadeCall], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    name: str | None = Field(None, description="The function's, in the answer of one.")

    @field_validator("content", mode="wrap")
    @classmethod
    def _text_only(cls, value: Any, read: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(value, str):
            return read(value)
        if not isinstance(value, list):
            raise ValueError("give a text, or a list of parts of type text")
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise ValueError("this model takes text only: send parts of type text")
        return _PARTS.validate_python(value)

    def check(self, where: str) -> None:
        """ApiError for a field that the role needs, or has no use for."""
        given = self.model_fields_set - {"role"}
        needed, allowed = _FIELDS_OF.get(self.role, ({"content"}, {"content"}))
        if self.role == "assistant" and not self.calls:
            needed = {"content"}
        for field in sorted(needed - given):
            raise refused(f"{where}.{field}", f"{where}.{field} is missing: add it.")
        for field in sorted(given - allowed):
            raise unsupported(f"{where}.{field}", f"leave it out where the role is {self.role}")
        if self.tool_calls and self.function_call:
            message = f"{where} has tool_calls and function_call: give one of them."
            raise refused(f"{where}.function_call", message)

    @property
    def calls(self) -> list[MadeCall]:
        if self.function_call is not None:
            return [MadeCall(id=self.function_call.name, function=self.function_call)]
        return self.tool_calls or []

    def as_prompt(self) -> dict[str, Any]:
        """The message as tokenizers and tool formats take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message: dict[str, Any] = {"role": _ROLES.get(self.role, self.role), "content": text}
        if self.calls:
            message["tool_calls"] = [call.model_dump() for call in self.calls]
        if message["role"] == "tool":
            message["tool_call_id"] = self.tool_call_id or self.name
        return message


def check_messages(messages: Sequence[ChatMessage]) -> None:
    for index, message in enumerate(messages):
        message.check(f"messages[{index}]")


_ROLES = {"developer": "system", "function": "tool"}
# Roles with fields of their own: (those that are needed, those that may be there).
_FIELDS_OF: dict[str, tuple[set[str], set[str]]] = {
    "assistant": (set(), {"content", "tool_calls", "function_call"}),
    "tool": ({"content", "tool_call_id"}, {"content", "tool_call_id", "name"}),
    "function": ({"content", "name"}, {"content", "name"}),
}


class FunctionTool(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str = ""
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool = Field(False, description="Every call is valid under the schema.")


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: FunctionName


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """strict: no properties but those that the schema names. It is kept in either case."""

    name: FunctionName
    description: str | None = None
    # "schema" is taken by pydantic.
    json_schema: dict[str, Any] = Field({}, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_due(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type json_schema, and only with it")
        return self
