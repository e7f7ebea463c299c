"""The tokenizer of the first Qwen generation: `qwen.tiktoken`, byte-level BPE by ranks."""

from __future__ import annotations

import binascii
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nybble.errors import CheckpointError
from nybble.tokenizer import chatml
from nybble.tokenizer.base import Message, Tokenizer, unknown_id

NUM_RANKS = 151_643
NUM_EXTRAS = 205
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END_OF_TEXT = "<|endoftext|>"
_SPECIAL_TOKENS = (
    _END_OF_TEXT,
    chatml.IM_START,
    chatml.IM_END,
    *(f"<|extra_{i}|>" for i in range(NUM_EXTRAS)),
)
# tiktoken's regex engine gives up after a million steps back over one run of whitespace. The
# look-behind lets the search try each run once, at its start.
_ENDLESS_SPACE = re.compile(r"(?<!\s)\s{500000}")


class QwenTokenizer(Tokenizer):
    """`qwen.tiktoken` and ChatML, as the first Qwen generation was trained with.

    Args:
        ranks_file: 151,643 lines of `base64 rank`.
        extra_vocab_file: more such lines, with ids of their own; entries whose token or id is
            taken already are left out, as the original release does.

    Raises:
        CheckpointError: a file that is missing, damaged or not of this form.
    """

    def __init__(self, ranks_file: Path, extra_vocab_file: Path | None = None) -> None:
        ranks = read_ranks(ranks_file)
        _check_ranks(ranks, ranks_file)
        self.special_tokens = {t: NUM_RANKS + i for i, t in enumerate(_SPECIAL_TOKENS)}
        if extra_vocab_file is not None:
            taken = frozenset(ranks.values()) | frozenset(self.special_tokens.values())
            extra = read_ranks(extra_vocab_file)
            ranks.update((t, i) for t, i in extra.items() if t not in ranks and i not in taken)
        self._ranks = ranks
        self._bpe = _encoding(SPLIT_PATTERN, ranks)
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        self.vocab_size = max(self._bytes) + 1
        self.unused_ids = frozenset(range(self.vocab_size)) - self._bytes.keys()
        self.hidden_ids = frozenset(self.special_tokens.values())
        ends = (chatml.IM_END, chatml.IM_START, _END_OF_TEXT)
        self.eos_token_ids = frozenset(self.special_tokens[token] for token in ends)

    def apply_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        newline = self.encode("\n")
        ids: list[int] = []
        for role, content in chatml.read_entries(messages, tools, template_kwargs):
            ids += newline if ids else []
            ids += self._open(role) + self.encode(content)
            ids.append(self.special_tokens[chatml.IM_END])
        return ids + newline + self._open("assistant") if add_generation_prompt else ids

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        entries = chatml.read_entries(messages, tools, template_kwargs)
        return chatml.render(entries, add_generation_prompt)

    def _open(self, role: str) -> list[int]:
        return [self.special_tokens[chatml.IM_START], *self.encode(role), *self.encode("\n")]

    def _normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text)

    def _encode_plain(self, text: str) -> list[int]:
        if _ENDLESS_SPACE.search(text):
            return self._encode_pieces(text)
        ids: list[int] = self._bpe.encode_ordinary(text)
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        """The same ids with the split done by another regex engine, one without that limit."""
        import regex  # type: ignore[import-untyped]  # comes with tiktoken

        pieces = regex.findall(SPLIT_PATTERN, text)
        return [token for piece in pieces for token in self._whole_bpe.encode_ordinary(piece)]

    @cached_property
    def _whole_bpe(self) -> Any:
        return _encoding(r"(?s:.+)", self._ranks)

    def _token_bytes(self, token: int) -> bytes:
        try:
            return self._bytes[token]
        except (KeyError, TypeError):
            raise unknown_id(token, self.vocab_size) from None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks from a file of `base64 rank` lines (tiktoken's BPE format)."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): fetch it again.") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError as error:
            raise CheckpointError(
                f"{path}, line {number}: not a base64 token and its rank; the file is damaged or "
                "only a Git-LFS pointer: fetch it again."
            ) from error
    if len(set(ranks.values())) != len(ranks) or b"" in ranks or min(ranks.values(), default=0) < 0:
        raise CheckpointError(
            f"{path} has an empty token, a negative rank or one rank twice: fetch it again."
        )
    return ranks


def _check_ranks(ranks: Mapping[bytes, int], path: Path) -> None:
    whole = len(ranks) == NUM_RANKS and max(ranks.values()) == NUM_RANKS - 1
    if not whole or not all(bytes((byte,)) in ranks for byte in range(256)):
        raise CheckpointError(
            f"{path} holds {len(ranks):,} ranks instead of 0 to {NUM_RANKS - 1:,} with every "
            "single byte among them: fetch it again."
        )


def _encoding(pattern: str, ranks: dict[bytes, int]) -> Any:
    import tiktoken

    return tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
