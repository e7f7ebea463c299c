"""What clients get: OpenAI's objects."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: Error


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """prompt_tokens counts each prompt once, however many choices it has; cached_tokens of them
    were found in the cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class SparseModel(BaseModel):
    """Leaves out what is None: a delta says only what is new."""

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


# -- chats ---------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class Function(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: Function


def _is_none(value: object) -> bool:
    return value is None


class Message(BaseModel):
    """content is null where the model calls tools and says nothing beside."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | None = Field(default=None, exclude_if=_is_none)
    function_call: Function | None = Field(default=None, exclude_if=_is_none)


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(SparseModel):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(SparseModel):
    """The first delta of a call has its id and name, the others pieces of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(SparseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionDelta | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]


class ChatUsageChunk(ChatChunk):
    """A chunk of a stream that was asked for usage: null in all chunks but the last."""

    usage: Usage | None = None


# -- completions ---------------------------------------------------------------------------------


class CompletionLogprobs(BaseModel):
    """Lists of one entry a token. The first token of a prompt has no probability: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class CompletionReply(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[CompletionChoice]


class CompletionUsageReply(CompletionReply):
    """A whole answer, or a chunk of a stream that was asked for usage."""

    usage: Usage | None = None


# -- the others ----------------------------------------------------------------------------------


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nybble"
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """vLLM's object. All null: no text becomes a control token here, so none is named."""

    bos_token: None = None
    eos_token: None = None
    pad_token: None = None
    chat_template: None = None


class Health(BaseModel):
    status: str


class Version(BaseModel):
    version: str
