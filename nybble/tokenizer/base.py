"""What every tokenizer offers: text to ids and back, and a chat to the ids of its prompt."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from nybble.errors import RequestError

DEFAULT_SYSTEM = "You are a helpful assistant."

Message = Mapping[str, Any]
Turn = tuple[str, str]  # (what the user said, what the assistant answered)
Special = Literal["all"] | Collection[str]


class Tokenizer(ABC):
    """Text <-> token ids, and chats -> prompts, of one checkpoint.

    Attributes:
        special_tokens: control tokens and their ids, all that `allowed_special` can name.
        hidden_ids: the ids that `skip_special_tokens` leaves out of decoded text.
        eos_token_ids: the ids that end a chat turn.
        prompt_prefix_ids: ids that go before a raw (not chat) prompt, such as Llama's BOS.
        vocab_size: largest real id + 1; an id from here on is padding, never to be sampled.
        unused_ids: ids below `vocab_size` that mean nothing either.
        chat_template: Jinja source of the chat form, None where it has no template.
    """

    special_tokens: Mapping[str, int]
    hidden_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    prompt_prefix_ids: tuple[int, ...] = ()
    vocab_size: int
    unused_ids: frozenset[int] = frozenset()
    chat_template: str | None = None

    def encode(
        self, text: str, allowed_special: Special = (), disallowed_special: Special = ()
    ) -> list[int]:
        """Ids of `text`. Control tokens spelled in it are plain text unless allowed.

        Args:
            allowed_special: the control tokens to parse, or "all"; spelled as in tiktoken.
            disallowed_special: refuse a text that contains one of these ("all": any control
                token that is not allowed).

        Raises:
            RequestError: lone surrogates, an unknown name, or a disallowed token in the text.
        """
        text = self._normalize(checked_text(text))
        allowed = self._named(allowed_special)
        if disallowed_special == "all":
            disallowed_special = self.special_tokens.keys() - allowed
        self._refuse(text, disallowed_special)
        if not allowed:
            return self._encode_plain(text)
        pattern = self._any_special if allowed_special == "all" else self._pattern(allowed)
        return encode_around(pattern, self.special_tokens, text, self._encode_plain)

    def decode(
        self, ids: Iterable[int], errors: str = "replace", skip_special_tokens: bool = False
    ) -> str:
        """Text of `ids`; bytes that are no UTF-8 are handled as `bytes.decode(errors=...)` does.

        Raises:
            RequestError: an id outside the vocabulary (padding included), or bad bytes under
                errors="strict".
        """
        if skip_special_tokens:
            ids = (token for token in ids if token not in self.hidden_ids)
        try:
            return self.decode_bytes(ids).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise RequestError(
                f'The tokens do not spell valid UTF-8 ({error}): decode with errors="replace".'
            ) from error
        except LookupError as error:
            raise RequestError(
                f'errors={errors!r} is unknown: use "replace", "ignore" or "strict".'
            ) from error

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; a token may hold a part of a character.

        Raises:
            RequestError: an id that is not in the vocabulary.
        """
        return b"".join(map(self._token_bytes, ids))

    @abstractmethod
    def apply_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Ids of a chat in OpenAI's form: [{"role": ..., "content": ...}, ...].

        No text in `messages` or `tools` can become a control token.
        """

    @abstractmethod
    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """The same chat as text, for people to read. To get ids, call `apply_chat`: parsing this
        text would turn control tokens that users wrote into real ones."""

    def make_context(
        self,
        query: str,
        history: Sequence[Turn] | None = None,
        system: str | None = DEFAULT_SYSTEM,
        max_window_size: int = 6144,
    ) -> list[int]:
        """Ids of a prompt from `query` and the newest turns of `history` that fit.

        Turns are kept, newest first, while the system prompt and the kept turns take fewer than
        `max_window_size` tokens; the query itself is not counted, as in the first Qwen release.
        """
        opening = [] if system is None else [{"role": "system", "content": system}]
        turns: list[Message] = []
        for user, answer in checked_history(history):
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

        def newest(count: int) -> list[Message]:
            return [*opening, *turns[len(turns) - 2 * count :]]

        def window(count: int) -> int:
            return len(self.apply_chat(newest(count), add_generation_prompt=False))

        kept = bisect_left(range(1, len(turns) // 2 + 1), max_window_size, key=window)
        return self.apply_chat([*newest(kept), {"role": "user", "content": query}])

    def _normalize(self, text: str) -> str:
        """What happens to the whole text before control tokens are looked for."""
        return text

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""

    @abstractmethod
    def _token_bytes(self, token: int) -> bytes:
        """The bytes of one token, or RequestError."""

    @cached_property
    def _any_special(self) -> re.Pattern[str]:
        return self._pattern(self.special_tokens)

    def _pattern(self, names: Collection[str]) -> re.Pattern[str]:
        return any_of(names)

    def _named(self, special: Special) -> Collection[str]:
        if special == "all":
            return self.special_tokens.keys()
        unknown = sorted(set(special) - self.special_tokens.keys())
        if unknown:
            raise RequestError(
                f"allowed_special names {unknown[0]!r}, which is no control token of this model: "
                "choose from tokenizer.special_tokens."
            )
        return set(special)

    def _refuse(self, text: str, disallowed: Collection[str]) -> None:
        found = any_of(disallowed).search(text) if disallowed else None
        if found:
            raise RequestError(
                f"The text contains the control token {found[0]!r}, which is disallowed here: "
                "remove it, name it in allowed_special, or pass disallowed_special=() to read it "
                "as plain text."
            )


def encode_around(
    pattern: re.Pattern[str],
    found: Mapping[str, int],
    text: str,
    encode: Callable[[str], list[int]],
) -> list[int]:
    """Ids of text: an id from `found` for each match's group, and `encode` for what is between."""
    ids: list[int] = []
    start = 0
    for match in pattern.finditer(text):
        ids += encode(text[start : match.start()])
        ids.append(found[match[match.lastindex or 0]])
        start = match.end()
    return ids + encode(text[start:])


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern for any of `texts`, the longest first; one that never matches if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if texts else r"(?!)")


def checked_text(text: object, what: str = "The text") -> str:
    """`text`, if it is a string that has a UTF-8 form."""
    if not isinstance(text, str):
        raise RequestError(f"{what} is {type(text).__name__}, not text: pass a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds a lone surrogate at character {error.start}, which no UTF-8 text "
            'can: clean it with text.encode("utf-8", "replace").decode().'
        ) from error
    return text


def checked_history(history: Sequence[Turn] | None) -> list[Turn]:
    """`history` as a list, if it is made of (user, assistant) pairs of text."""
    turns: list[Turn] = []
    for index, turn in enumerate(history or ()):
        if isinstance(turn, str) or not isinstance(turn, Sequence) or len(turn) != 2:
            raise RequestError(f"history[{index}] is no pair: give (user, assistant) texts.")
        user, answer = (checked_text(text, f"history[{index}]") for text in turn)
        turns.append((user, answer))
    return turns


def unknown_id(token: object, vocab_size: int) -> RequestError:
    return RequestError(
        f"Token id {token!r} is not in the vocabulary: pass ids from 0 to {vocab_size - 1} that "
        "this tokenizer gave."
    )
