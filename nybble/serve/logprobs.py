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
    for item in placed:
        chosen = _entry(tokenizer, item.logprob.token_id, item.logprob.logprob)
        top = [_entry(tokenizer, token, value) for token, value in item.logprob.top]
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
        entry = item.logprob
        name, value = _name(tokenizer, entry.token_id), max(entry.logprob, _LEAST)
        top = {_name(tokenizer, token): max(other, _LEAST) for token, other in entry.top}
        result.tokens.append(name)
        result.token_logprobs.append(value)
        result.top_logprobs.append({**top, name: value})
        result.text_offset.append(item.offset)
    return result


def _name(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; its bytes where they are no whole characters."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
