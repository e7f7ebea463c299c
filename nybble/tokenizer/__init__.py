"""Text to ids and back, chats to prompts, and text while it is being generated."""

from nybble.tokenizer.base import DEFAULT_SYSTEM, Message, Tokenizer, Turn
from nybble.tokenizer.loading import has_tokenizer, load_tokenizer
from nybble.tokenizer.stream import StopMatcher, StreamDecoder

__all__ = [
    "DEFAULT_SYSTEM",
    "Message",
    "StopMatcher",
    "StreamDecoder",
    "Tokenizer",
    "Turn",
    "has_tokenizer",
    "load_tokenizer",
]
