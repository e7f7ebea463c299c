"""What clients send: OpenAI's requests, and the usual extras. An unknown field is refused.

A field that is null counts as left out. Numbers are checked where they are used
(SamplingParams), so that the command line, Python and HTTP refuse the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from nybble.sampling import SamplingParams
from nybble.serve.errors import refused, unsupported

MOST_CHOICES, MOST_TOP_LOGPROBS = 128, 20


class Body(BaseModel):
    """Strict: no text is read as a number, and no field is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class StreamOptions(Body):
    include_usage: bool = False


class Generating(Body):
    """The fields that chats and completions share.

    user, safety_identifier and prompt_cache_key are taken because clients send them; nothing is
    done with them, and nothing is kept. store may only be false: nothing is.
    """

    model: str | None = Field(None, description="Left out: the model that is served.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = Field(None, description="Choice i of n uses seed + i.")
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("stop", mode="wrap")
    @classmethod
    def _plain_stop(cls, value: Any, read: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(text, str) for text in value)
        ):
            return read(value)
        raise ValueError("give a text, or a list of texts")

    def check(self) -> None:
        """ApiError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "stream_options goes with stream: true only.")

    def sampling(self) -> dict[str, Any]:
        """What was said of SamplingParams' fields; what was not keeps the model's default."""
        names = SamplingParams.__dataclass_fields__.keys() & self.model_fields_set
        given = {name: getattr(self, name) for name in names}
        if self.logit_bias is not None:
            given["logit_bias"] = read_bias(self.logit_bias)
        return given


def read_bias(bias: dict[str, float]) -> dict[int, float]:
    """JSON's keys are text, those of logit_bias are token ids."""
    if not all(key.isascii() and key.isdigit() for key in bias):
        raise refused("logit_bias", "logit_bias takes token ids as keys: see /tokenize.")
    return {int(key): value for key, value in bias.items()}


# -- chats ---------------------------------------------------------------------------------------


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
MOST_TOOLS = 128


class TextPart(Body):
    type: Literal["text"]
    text: str


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
    tool_calls: Annotated[list[MadeCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    name: str | None = Field(None, description="The function's, in the answer of one.")

    @field_validator("content", mode="wrap")
    @classmethod
    def _text_only(cls, value: Any, read: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(value, list) and any(
            isinstance(part, dict) and part.get("type") != "text" for part in value
        ):
            raise ValueError("this model takes text only: send parts of type text")
        if not isinstance(value, (str, list)):
            raise ValueError("give a text, or a list of parts of type text")
        return read(value)

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


class ChatRequest(Generating):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolDefinition], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionTool], Field(min_length=1, max_length=MOST_TOOLS)] | None = (
        Field(None, description="The first name of tools.")
    )
    function_call: Literal["none", "auto"] | NamedFunction | None = Field(
        None, description="The first name of tool_choice."
    )

    def check(self) -> None:
        super().check()
        check_messages(self.messages)
        for name in _OWN_FIELDS & (self.chat_template_kwargs or {}).keys():
            field = f"chat_template_kwargs.{name}"
            raise refused(field, f"{field} has a field of its own, or none: leave it out.")
        for field, needed in _NEEDED.items():
            if getattr(self, field) is not None and getattr(self, needed) is None:
                raise refused(field, f"{field} goes with {needed} only: add them, or leave it out.")
        if self.tools is not None and self.functions is not None:
            raise refused("functions", "tools and functions mean the same: give one of them.")
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "top_logprobs goes with logprobs: true only.")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise refused(
                "max_completion_tokens",
                "max_tokens and max_completion_tokens mean the same: give one of them.",
            )

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        given.pop("logprobs", None)
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given


# What the server itself gives to the template.
_OWN_FIELDS = {"self", "messages", "tools", "add_generation_prompt"}
_NEEDED = {
    "tool_choice": "tools",
    "parallel_tool_calls": "tools",
    "function_call": "functions",
}

# -- completions ---------------------------------------------------------------------------------

Prompt = str | list[int]
_COMPLETION_TOKENS = 16


class CompletionRequest(Generating):
    """POST /v1/completions.

    echo puts the prompt before the answer, with its log-probabilities where they are asked for;
    max_tokens may be 0 then. Left out, max_tokens is 16, as OpenAI's API says.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool = False
    best_of: Literal[1] | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_kind(cls, value: Any, read: ModelWrapValidatorHandler[Any]) -> Any:
        if not _is_prompts(value):
            raise ValueError(
                "give a text, a list of texts, a list of token ids, or a list of such lists"
            )
        return read(value)

    def sampling(self) -> dict[str, Any]:
        given = {"max_tokens": _COMPLETION_TOKENS, **super().sampling()}
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            given["prompt_logprobs"] = self.logprobs or 0
        return given

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt of the request, one or many."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)


def _is_prompts(value: Any) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return all(isinstance(prompt, list) and _all_are(int, prompt) for prompt in value)
    return _all_are(str, value) or _all_are(int, value)


def _all_are(kind: type, values: list[Any]) -> bool:
    return all(type(value) is kind for value in values)


# -- the others ----------------------------------------------------------------------------------


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a chat as it stands in a prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = Field(
        True, description="Of a prompt: begin with the beginning-of-text token, where there is one."
    )
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
