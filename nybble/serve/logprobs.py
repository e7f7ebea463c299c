"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.serve.answers import PlacedLogprob
from nybble.serve.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from nybble.tokenizer import Tokenizer

# JSON has no infinity; OpenAI's API says this of what cannot be.
_LEAST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, placed: Sequence[PlacedLogprob]) -> ChatLogprobs:
    content = []
    for entry in (item.logprob for item in placed if item.logprob is not None):
        chosen = _entry(tokenizer, entry.token_id, entry.logprob)
        top = [_entry(tokenizer, token, value) for token, value in entry.top]
        content.append(ChatTokenLogprob(**dict(chosen), top_logprobs=top))
    return ChatLogprobs(content=content)


def _entry(tokenizer: Tokenizer, token: int, value: float) -> TopLogprob:
    raw = tokenizer.decode_bytes([token])
    return TopLogprob(
        token=raw.decode("utf-8", "replace"), logprob=max(value, _LEAST), bytes=list(raw)
    )


def completion_logprobs(
    tokenizer: Tokenizer, placed: Sequence[PlacedLogprob]
) -> CompletionLogprobs:
    """The alternatives of a token name the token itself too, as OpenAI's do."""
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for item in placed:
        name = _name(tokenizer, item.token)
        result.tokens.append(name)
        result.text_offset.append(item.offset)
        if item.logprob is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
        else:
            value = max(item.logprob.logprob, _LEAST)
            top = {_name(tokenizer, token): max(p, _LEAST) for token, p in item.logprob.top}
            result.token_logprobs.append(value)
            result.top_logprobs.append({**top, name: value})
    return result


def _name(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; its bytes where they are no whole characters."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
