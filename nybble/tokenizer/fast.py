"""Tokenizers of the later families: byte-level BPE in a `tokenizer.json`, chats by template."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import CheckpointError, RequestError
from nybble.tokenizer.base import Message, Tokenizer, encode_around, unknown_id
from nybble.tokenizer.messages import read_messages

if TYPE_CHECKING:
    from tokenizers import AddedToken

    from nybble.tokenizer.template import ChatTemplate, Rendering

# Whatever a checkpoint's configuration says, these end a turn or a document where they exist.
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


class JsonTokenizer(Tokenizer):
    """A byte-level BPE `tokenizer.json` and the chat template that belongs to it.

    Args:
        tokenizer_file: in the format of Hugging Face's `tokenizers`.
        template: Jinja source of the chat template, None if the checkpoint has none.
        named_tokens: "eos_token" and its like, which templates may use by name.

    Raises:
        CheckpointError: the file is damaged, or is no byte-level BPE.
    """

    def __init__(
        self, tokenizer_file: Path, template: str | None, named_tokens: Mapping[str, str]
    ) -> None:
        from tokenizers import Tokenizer as Backend

        full = _read_backend(tokenizer_file)
        self._added = {token.content: token for token in full.get_added_tokens_decoder().values()}
        vocab = full.get_vocab(with_added_tokens=True)
        # The same pipeline without added tokens: for it, every text is plain text.
        self._backend = Backend(full.model)
        if full.normalizer is not None:
            self._backend.normalizer = full.normalizer
        if full.pre_tokenizer is not None:
            self._backend.pre_tokenizer = full.pre_tokenizer
        self._added_bytes: dict[int, bytes] = {vocab[text]: text.encode() for text in self._added}
        self._words = {t: vocab[t] for t, token in self._added.items() if not _is_control(token)}
        self.special_tokens = {t: vocab[t] for t in self._added if t not in self._words}
        self._control_ids = frozenset(self.special_tokens.values())
        self.hidden_ids = frozenset(vocab[t] for t, token in self._added.items() if token.special)
        self.prompt_prefix_ids = _prefix_ids(full)
        self.vocab_size = max(vocab.values()) + 1
        self.unused_ids = frozenset(range(self.vocab_size)) - frozenset(vocab.values())
        ends = (*_TURN_ENDS, named_tokens.get("eos_token", ""))
        self.eos_token_ids = frozenset(vocab[t] for t in ends if t in vocab)
        self.chat_template = template
        self._named_tokens = dict(named_tokens)

    def apply_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        chat = self._render(messages, tools, add_generation_prompt, template_kwargs)

        def encode(part: str) -> list[int]:
            return self._encode_plain(chat.plain(part))

        return encode_around(self._any_special, self.special_tokens, chat.marked, encode)

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        return self._render(messages, tools, add_generation_prompt, template_kwargs).text

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, Any],
    ) -> Rendering:
        chat = read_messages(messages)
        return self._template.render(chat, tools, add_generation_prompt, template_kwargs)

    @cached_property
    def _template(self) -> ChatTemplate:
        from nybble.tokenizer.template import ChatTemplate

        if self.chat_template is None:
            raise RequestError(
                "This checkpoint has no chat template: give a plain prompt instead of a chat, or "
                "put a chat_template.jinja into its folder."
            )
        return ChatTemplate(self.chat_template, self.special_tokens, self._named_tokens)

    def _pattern(self, names: Collection[str]) -> re.Pattern[str]:
        longest_first = sorted((self._added[name] for name in names), key=_length, reverse=True)
        return re.compile("|".join(map(_match_added, longest_first)) or r"(?!)")

    @cached_property
    def _any_word(self) -> re.Pattern[str]:
        return self._pattern(self._words)

    def _encode_plain(self, text: str) -> list[int]:
        if not self._words:
            return self._encode_piece(text)
        return encode_around(self._any_word, self._words, text, self._encode_piece)

    def _encode_piece(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not self._control_ids.isdisjoint(ids):
            raise RequestError(
                "The text spells a control token that this vocabulary cannot write in plain "
                "letters: remove it, or allow it with allowed_special."
            )
        return ids

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added_bytes:
            return self._added_bytes[token]
        try:
            text = self._backend.id_to_token(token)
        except (OverflowError, TypeError):
            text = None
        if text is None:
            raise unknown_id(token, self.vocab_size)
        try:
            return bytes(map(_BYTE_OF.__getitem__, text))
        except KeyError:  # no byte-level token: its text is meant as it stands
            return str(text).encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, turned round."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _is_control(token: AddedToken) -> bool:
    """Whether an added token is one; otherwise it is a word that somebody added for text."""
    return token.special or not all(c.isalnum() or c.isspace() for c in token.content)


def _length(token: AddedToken) -> int:
    return len(token.content)


def _match_added(token: AddedToken) -> str:
    edges = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{before}{edges[0]}({re.escape(token.content)}){edges[1]}{after}"


def _read_backend(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): fetch it again.") from error
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{path} is no valid tokenizer ({error}): fetch it again.") from error
    if not _is_byte_level(backend):
        raise CheckpointError(
            f"{path} is no byte-level BPE, the only kind that nybble reads: use the checkpoint "
            "with token ids, or one of a Qwen or Llama 3 family."
        )
    return backend


def _prefix_ids(backend: Any) -> tuple[int, ...]:
    """What the file's own pipeline puts before a text: no padding, and nothing from behind it."""
    backend.no_padding()
    backend.no_truncation()
    sample = backend.encode("a")
    marked = zip(sample.ids, sample.special_tokens_mask, strict=True)
    return tuple(token for token, _ in takewhile(itemgetter(1), marked))


def _is_byte_level(backend: Any) -> bool:
    if backend.decoder is None:
        return False
    state = json.loads(backend.decoder.__getstate__())
    parts = state.get("decoders", [state])
    return [part["type"] for part in parts] == ["ByteLevel"]
