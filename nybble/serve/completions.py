"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from nybble.serve.answers import Answers, Piece, PlacedLogprob
from nybble.serve.host import host_of, record_of
from nybble.serve.logprobs import completion_logprobs
from nybble.serve.protocol import CompletionRequest
from nybble.serve.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    CompletionUsageReply,
    new_id,
    now,
)
from nybble.serve.service import Service
from nybble.serve.sse import EventStream, while_connected

router = APIRouter()


@router.post("/v1/completions", response_model=CompletionUsageReply)
async def completions(body: CompletionRequest, request: Request) -> Response | CompletionUsageReply:
    """Continue texts or token ids as they are, whole or streamed."""
    host = host_of(request)
    service = host.service
    model = service.model(body.model)
    body.check()
    service.check_room(len(body.prompts), body.n)
    params = service.params(body.sampling())
    prompts = [await service.prompt_ids(prompt) for prompt in body.prompts]
    # A text comes back as it was sent, without the token that was put before it.
    prefix = len(service.tokenizer.prompt_prefix_ids)
    echoes = [prefix if isinstance(prompt, str) else 0 for prompt in body.prompts]
    answers = service.start(
        prompts, params, body.n, record_of(request), echoes=echoes if body.echo else None
    )
    completion = _Completion(service, model, body)
    if body.stream:
        return await EventStream.open(completion.events(answers), host.settings)
    async with answers:
        return await while_connected(request.receive, completion.whole(answers))


class _Completion:
    """Turns the answers to one request into what its client gets."""

    def __init__(self, service: Service, model: str, body: CompletionRequest) -> None:
        self.service = service
        self.model = model
        self.id = new_id("cmpl")
        self.created = now()
        self.logprobs = body.logprobs is not None
        self.usage = body.stream_options is not None and body.stream_options.include_usage

    async def whole(self, answers: Answers) -> CompletionUsageReply:
        texts = [""] * len(answers)
        logprobs: list[list[PlacedLogprob]] = [[] for _ in texts]
        reasons: list[str | None] = [None] * len(answers)
        async with aclosing(answers.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index] += piece.text
                logprobs[piece.index] += piece.logprobs
                reasons[piece.index] = piece.finish_reason
        choices = [
            CompletionChoice(
                index=index,
                text=text,
                logprobs=self._logprobs(logprobs[index]),
                finish_reason=reasons[index],
            )
            for index, text in enumerate(texts)
        ]
        return self._usage_reply(choices, answers)

    async def events(self, answers: Answers) -> AsyncGenerator[str]:
        """Nothing first (which starts the answers), then text as it comes, then the usage."""
        async with answers:
            yield ""
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    yield self._chunk(piece)
            if self.usage:
                yield self._usage_reply([], answers).model_dump_json()

    def _usage_reply(
        self, choices: list[CompletionChoice], answers: Answers
    ) -> CompletionUsageReply:
        return CompletionUsageReply(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=answers.usage,
        )

    def _chunk(self, piece: Piece) -> str:
        choice = CompletionChoice(
            index=piece.index,
            text=piece.text,
            logprobs=self._logprobs(piece.logprobs),
            finish_reason=piece.finish_reason,
        )
        kind = CompletionUsageReply if self.usage else CompletionReply
        chunk = kind(id=self.id, created=self.created, model=self.model, choices=[choice])
        return chunk.model_dump_json()

    def _logprobs(self, placed: Sequence[PlacedLogprob]) -> CompletionLogprobs | None:
        return completion_logprobs(self.service.tokenizer, placed) if self.logprobs else None
