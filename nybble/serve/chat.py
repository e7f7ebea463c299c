"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from nybble.serve.answers import Answers, Piece, PlacedLogprob
from nybble.serve.host import host_of, record_of
from nybble.serve.logprobs import chat_logprobs
from nybble.serve.protocol import ChatRequest
from nybble.serve.responses import (
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatReply,
    ChatUsageChunk,
    ChunkChoice,
    Delta,
    Message,
    new_id,
    now,
)
from nybble.serve.service import Service
from nybble.serve.sse import EventStream, while_connected

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatReply)
async def chat_completions(body: ChatRequest, request: Request) -> Response | ChatReply:
    """Answer a chat, whole or streamed."""
    host = host_of(request)
    service = host.service
    model = service.model(body.model)
    body.check()
    params = service.params(body.sampling())
    ids = await service.chat_ids(
        [message.as_prompt() for message in body.messages], body.chat_template_kwargs or {}
    )
    answers = service.start([ids], params, body.n, record_of(request))
    chat = _Chat(service, model, body)
    if body.stream:
        return await EventStream.open(chat.events(answers), host.settings.keep_alive_seconds)
    return await while_connected(request.receive, chat.whole(answers))


class _Chat:
    """Turns the answers to one chat into what its client gets."""

    def __init__(self, service: Service, model: str, body: ChatRequest) -> None:
        self.service = service
        self.model = model
        self.id = new_id("chatcmpl")
        self.created = now()
        self.logprobs = body.logprobs
        self.usage = body.stream_options is not None and body.stream_options.include_usage

    async def whole(self, answers: Answers) -> ChatReply:
        texts = [""] * len(answers)
        logprobs: list[list[PlacedLogprob]] = [[] for _ in texts]
        reasons = [""] * len(answers)
        async with answers:
            async for piece in answers.pieces():
                texts[piece.index] += piece.text
                logprobs[piece.index] += piece.logprobs
                reasons[piece.index] = piece.finish_reason or ""
        choices = [
            ChatChoice(
                index=index,
                message=Message(content=text),
                logprobs=self._logprobs(logprobs[index]),
                finish_reason=reasons[index],
            )
            for index, text in enumerate(texts)
        ]
        return ChatReply(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=answers.usage,
        )

    async def events(self, answers: Answers) -> AsyncGenerator[str]:
        """Each choice: its role, its content, why it ended; then the usage, where asked for."""
        async with answers:
            for index in range(len(answers)):
                yield self._chunk(
                    ChunkChoice(index=index, delta=Delta(role="assistant", content=""))
                )
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    for choice in self._choices(piece):
                        yield self._chunk(choice)
            if self.usage:
                yield ChatUsageChunk(
                    id=self.id,
                    created=self.created,
                    model=self.model,
                    choices=[],
                    usage=answers.usage,
                ).model_dump_json()

    def _choices(self, piece: Piece) -> list[ChunkChoice]:
        choices = []
        if piece.text or piece.logprobs:
            content = ChunkChoice(
                index=piece.index,
                delta=Delta(content=piece.text),
                logprobs=self._logprobs(piece.logprobs),
            )
            choices.append(content)
        if piece.finish_reason:
            end = ChunkChoice(index=piece.index, delta=Delta(), finish_reason=piece.finish_reason)
            choices.append(end)
        return choices

    def _chunk(self, choice: ChunkChoice) -> str:
        kind = ChatUsageChunk if self.usage else ChatChunk
        chunk = kind(id=self.id, created=self.created, model=self.model, choices=[choice])
        return chunk.model_dump_json()

    def _logprobs(self, placed: Sequence[PlacedLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self.service.tokenizer, placed) if self.logprobs else None
