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
    new_id,
    now,
)
from nybble.serve.service import Service
from nybble.serve.sse import EventStream, while_connected
from nybble.serve.structured import answer_grammar
from nybble.serve.toolcalls import Speech, chat_prompt, tool_use

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatReply)
async def chat_completions(body: ChatRequest, request: Request) -> Response | ChatReply:
    """Answer a chat, whole or streamed."""
    host = host_of(request)
    service = host.service
    model = service.model(body.model)
    body.check()
    service.check_room(1, body.n)
    use = tool_use(body, service.tokenizer)
    prompt = chat_prompt(body.messages, use.tools if use else (), service.tokenizer)
    params = service.params(body.sampling(), use.stop if use else ())
    ids = await service.chat_ids(prompt, body.chat_template_kwargs or {})
    resumed = bool(prompt.reply)
    grammar = await while_connected(request.receive, answer_grammar(body, use, resumed, service))
    constraint = grammar.constraint if grammar else None
    answers = service.start([ids], params, body.n, record_of(request), constraint=constraint)
    speeches = [use.speech(resumed=resumed) if use else Speech() for _ in range(body.n)]
    chat = _Chat(service, model, body, speeches)
    if body.stream:
        return await EventStream.open(chat.events(answers), host.settings)
    async with answers:
        return await while_connected(request.receive, chat.whole(answers))


class _Chat:
    """Turns the answers to one chat into what its client gets."""

    def __init__(
        self, service: Service, model: str, body: ChatRequest, speeches: Sequence[Speech]
    ) -> None:
        self.service = service
        self.speeches = speeches
        self.model = model
        self.id = new_id("chatcmpl")
        self.created = now()
        self.logprobs = body.logprobs
        self.usage = body.stream_options is not None and body.stream_options.include_usage

    async def whole(self, answers: Answers) -> ChatReply:
        logprobs: list[list[PlacedLogprob]] = [[] for _ in self.speeches]
        reasons = [""] * len(answers)
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                self._hear(piece, answers)
                logprobs[piece.index] += piece.logprobs
                reasons[piece.index] = piece.finish_reason or ""
        choices = [
            ChatChoice(
                index=index,
                message=speech.message(),
                logprobs=self._logprobs(logprobs[index]),
                finish_reason=speech.reason(reasons[index], streamed=False),
            )
            for index, speech in enumerate(self.speeches)
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
                    for choice in self._choices(piece, answers):
                        yield self._chunk(choice)
            if self.usage:
                yield ChatUsageChunk(
                    id=self.id,
                    created=self.created,
                    model=self.model,
                    choices=[],
                    usage=answers.usage,
                ).model_dump_json()

    def _hear(self, piece: Piece, answers: Answers) -> list[Delta]:
        speech, last = self.speeches[piece.index], piece.finish_reason is not None
        deltas = speech.hear(piece.text, last=last)
        if speech.done and not last:
            answers.stop(piece.index)
        return deltas

    def _choices(self, piece: Piece, answers: Answers) -> list[ChunkChoice]:
        deltas = self._hear(piece, answers)
        if piece.logprobs and not deltas:
            deltas = [Delta(content="")]
        choices = [ChunkChoice(index=piece.index, delta=delta) for delta in deltas]
        if choices:
            choices[0].logprobs = self._logprobs(piece.logprobs)
        if piece.finish_reason:
            reason = self.speeches[piece.index].reason(piece.finish_reason, streamed=True)
            choices.append(ChunkChoice(index=piece.index, delta=Delta(), finish_reason=reason))
        return choices

    def _chunk(self, choice: ChunkChoice) -> str:
        kind = ChatUsageChunk if self.usage else ChatChunk
        chunk = kind(id=self.id, created=self.created, model=self.model, choices=[choice])
        return chunk.model_dump_json()

    def _logprobs(self, placed: Sequence[PlacedLogprob]) -> ChatLogprobs | None:
        return chat_logprobs(self.service.tokenizer, placed) if self.logprobs else None
