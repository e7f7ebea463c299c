"""The small routes: models, health, version, tokens, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from nybble.serve.chatfields import check_messages
from nybble.serve.errors import ApiError, unknown_model
from nybble.serve.host import host_of
from nybble.serve.protocol import DetokenizeRequest, TokenizeRequest
from nybble.serve.responses import (
    DetokenizeReply,
    Health,
    Model,
    ModelList,
    TokenizeReply,
    TokenizerInfo,
    Version,
)
from nybble.serve.service import Service
from nybble.serve.toolcalls import chat_prompt
from nybble.tokenizer import Tokenizer

router = APIRouter()


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(request: Request) -> Response:
    """200 when requests are taken; 503 while loading or draining, and when something broke."""
    status = host_of(request).status
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/version")
async def version() -> Version:
    from nybble import __version__

    return Version(version=__version__)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    found = host_of(request).metrics
    return Response(found.render(), media_type=found.content_type)


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    service = host_of(request).service
    return ModelList(data=[_model(service, name) for name in service.names])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> Model:
    service = host_of(request).service
    if name not in service.names:
        raise unknown_model(name, service.names)
    return _model(service, name)


def _model(service: Service, name: str) -> Model:
    return Model(id=name, created=service.created, max_model_len=service.max_context)


@router.post("/tokenize", response_model_exclude_none=True)
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeReply:
    """The token ids of a text, or of a chat as the model gets it."""
    service = host_of(request).service
    service.model(body.model)
    ids = await _ids(body, service)
    names = None
    if body.return_token_strs:
        names = await asyncio.to_thread(_names, service.tokenizer, ids)
    return TokenizeReply(
        count=len(ids), max_model_len=service.max_context, tokens=ids, token_strs=names
    )


async def _ids(body: TokenizeRequest, service: Service) -> list[int]:
    if body.messages is not None:
        check_messages(body.messages)
        prompt = chat_prompt(body.messages, (), service.tokenizer)
        # An answer that is gone on from stands behind its beginning.
        begun = body.add_generation_prompt or prompt.reply != ""
        return await service.chat_ids(prompt, {"add_generation_prompt": begun})
    return await service.token_ids(body.prompt or "", special=body.add_special_tokens)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode_bytes([token]).decode("utf-8", "replace") for token in ids]


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeReply:
    service = host_of(request).service
    service.model(body.model)
    return DetokenizeReply(prompt=await asyncio.to_thread(service.tokenizer.decode, body.tokens))


@router.get("/tokenizer_info")
async def tokenizer_info() -> TokenizerInfo:
    """What lm-eval asks for before it takes /tokenize for its tokenizer."""
    return TokenizerInfo()


@router.post("/v1/embeddings", response_model=None)
async def embeddings() -> Response:
    raise ApiError(
        501,
        "This server generates text and has no embeddings: use a model that is made for them.",
        code="not_implemented",
        headers={"x-should-retry": "false"},
    )
