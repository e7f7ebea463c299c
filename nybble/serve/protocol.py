"""What clients send: OpenAI's requests, and the usual extras. An unknown field is refused.

A field that is null counts as left out. Numbers are checked where they are used
(SamplingParams), so that the command line, Python and HTTP refuse the same ones.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from nybble.sampling import SamplingParams
from nybble.serve.body import Body, Many
from nybble.serve.chatfields import (
    MOST_TOOLS,
    ChatMessage,
    FunctionTool,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ToolDefinition,
    check_messages,
)
from nybble.serve.errors import refused

MOST_CHOICES, MOST_TOP_LOGPROBS = 128, 20


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
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
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

    @field_validator("logit_bias", mode="wrap")
    @classmethod
    def _numbers(cls, value: Any, read: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(value, dict) and not all(
            isinstance(bias, (int, float)) for bias in value.values()
        ):
            raise ValueError("give a number for each token id")
        return read(value)

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


_TOKEN_ID = re.compile(r"[0-9]{1,9}")


def read_bias(bias: dict[str, float]) -> dict[int, float]:
    """JSON's keys are text, those of logit_bias are token ids."""
    if not all(_TOKEN_ID.fullmatch(key) for key in bias):
        raise refused("logit_bias", "logit_bias takes token ids as keys: see /tokenize.")
    return {int(key): value for key, value in bias.items()}


# -- chats ---------------------------------------------------------------------------------------


class ChatRequest(Generating):
    """POST /v1/chat/completions."""

    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[Many[ToolDefinition], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Many[FunctionTool], Field(min_length=1, max_length=MOST_TOOLS)] | None = (
        Field(None, description="The first name of tools.")
    )
    function_call: Literal["none", "auto"] | NamedFunction | None = Field(
        None, description="The first name of tool_choice."
    )

    @field_validator("tool_choice", "function_call", mode="wrap")
    @classmethod
    def _word_or_name(
        cls, value: Any, read: ModelWrapValidatorHandler[Any], info: ValidationInfo
    ) -> Any:
        tool = info.field_name == "tool_choice"
        words = ["none", "auto", *(["required"] if tool else [])]
        if isinstance(value, dict):
            return (NamedTool if tool else NamedFunction).model_validate(value)
        if value not in words:
            raise ValueError(f"give {', '.join(words)}, or an object that names one")
        return read(value)

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

    prompt: str | Many[str] | Many[int] | Many[Many[int]]
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
    messages: Many[ChatMessage] | None = None
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
    tokens: Many[int]
