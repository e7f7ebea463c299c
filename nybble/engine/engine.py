"""Runs a decoder: prompts in, token ids out. Knows ids and logits, never text."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from nybble.cache.store import KVStore, one_sequence
from nybble.engine.sampler import Sampler, TokenLogprob
from nybble.errors import CapacityError, NumericsError, RequestError
from nybble.model.decoder import Decoder, Step
from nybble.model.rope import Positions, make_positions, ntk_alpha
from nybble.sampling import SamplingParams

_LEAST_CAPACITY = 512  # tokens


@dataclass
class Timing:
    """Seconds and tokens of one generation; `reused_tokens` came from the cache."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first one, which the prefill yields."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class _Sequence:
    """The tokens whose keys and values stand in `store`, page after page, and their factors.

    The store and the factors are sized together, and belong to this sequence alone.
    """

    ids: list[int]
    alpha: float
    store: KVStore
    positions: Positions


@dataclass
class Generation:
    """One running request: iterate it for tokens. finish_reason is set when it ends.

    finish_reason: "stop" (an end-of-turn or stop token, which is not part of the output) or
    "length" (max_tokens or the context is used up); None while running or when abandoned.
    """

    prompt_ids: list[int]
    params: SamplingParams
    _tokens: Iterator[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    timing: Timing = field(default_factory=Timing)

    def __iter__(self) -> Iterator[int]:
        return self._tokens

    def close(self) -> None:
        """Abandon the request; its cache becomes free for the next one."""
        close = getattr(self._tokens, "close", None)
        if close is not None:
            close()


class Engine:
    """Generates for one request at a time, and keeps the last cache for a common prefix.

    Ids from vocab_size on, and unused_ids, are never sampled; eos_ids end an answer;
    max_context bounds prompt and answer together; kv_dtype is a kind of KVLayer.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        vocab_size: int,
        eos_ids: Collection[int],
        max_context: int,
        kv_dtype: str,
        prefill_chunk: int,
        unused_ids: Sequence[int] = (),
    ) -> None:
        self.decoder = decoder
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self.max_context = max_context
        self.kv_dtype = kv_dtype
        self.prefill_chunk = prefill_chunk
        self.unused_ids = list(unused_ids)
        self.device = decoder.embed_tokens.device
        self._idle: _Sequence | None = None

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Generation:
        """Check the request now, run it while the returned Generation is iterated.

        Raises RequestError or CapacityError at once, NumericsError while running.
        """
        ids = list(prompt_ids)
        self.check_ids(ids)
        if len(ids) >= self.max_context:
            raise CapacityError(
                f"The prompt has {len(ids)} tokens and the context {self.max_context}: shorten "
                "the prompt, or raise max_context if the model allows it."
            )
        generation = Generation(ids, params, iter(()))
        generation._tokens = self._run(generation)
        return generation

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """fp32 (tokens, vocab): the model's prediction after each token.

        The whole sequence counts as the prompt; its length is not bounded by max_context.
        """
        ids = list(token_ids)
        self.check_ids(ids)
        sequence = self._new_sequence(ids)
        logits = torch.cat(list(self._prefill(sequence, ids, every=True, limit=len(ids))))
        self._check_finite(logits, ids)
        return logits

    def check_ids(self, ids: list[int]) -> None:
        """RequestError unless ids is a non-empty list of ids that the model has rows for."""
        if not ids:
            raise RequestError("The prompt is empty: give at least one token.")
        rows = self.decoder.config.vocab_size
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < rows:
                raise RequestError(
                    f"{token!r} is not a token id of this model: use 0 to {rows - 1}."
                )

    # -- one request -----------------------------------------------------------------------

    def _run(self, generation: Generation) -> Iterator[int]:
        ids, params = generation.prompt_ids, generation.params
        sequence = self._take_sequence(ids)
        timing = generation.timing
        timing.prompt_tokens, timing.reused_tokens = len(ids), len(sequence.ids)
        sampler = Sampler(params, ids, self.vocab_size, self.device, self.unused_ids)
        stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_ids)
        room = self.max_context - len(ids)
        budget = min(params.max_tokens or room, room)
        pending = ids[len(sequence.ids) :]
        sound = True
        try:
            while True:
                begin = time.perf_counter()
                for logits in self._prefill(sequence, pending):
                    row = logits[-1]
                self._check_finite(row, sequence.ids)
                token = sampler.choose(row)
                self._clock(timing, time.perf_counter() - begin)
                if token in stop_ids:
                    generation.finish_reason = "stop"
                    return
                generation.token_ids.append(token)
                if params.logprobs is not None:
                    generation.logprobs.append(sampler.logprob(row, token))
                if len(generation.token_ids) == budget:
                    generation.finish_reason = "length"
                yield token
                if generation.finish_reason is not None:
                    return
                pending = [token]
        except NumericsError:
            sound = False
            raise
        finally:
            if sound:
                self._idle = sequence

    @staticmethod
    def _clock(timing: Timing, seconds: float) -> None:
        if timing.new_tokens == 0:
            timing.prefill_seconds = seconds
        else:
            timing.decode_seconds += seconds
        timing.new_tokens += 1

    def _prefill(
        self,
        sequence: _Sequence,
        ids: list[int],
        every: bool = False,
        limit: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Feed ids in chunks, so that memory stays bounded; yields each chunk's logits."""
        limit = limit or self.max_context
        for begin in range(0, len(ids), self.prefill_chunk):
            chunk = ids[begin : begin + self.prefill_chunk]
            tensor = torch.tensor(chunk, device=self.device)
            logits = self.decoder.forward(tensor, self._step(sequence, len(chunk), limit), every)
            sequence.ids.extend(chunk)
            yield logits

    def _step(self, sequence: _Sequence, tokens: int, limit: int) -> Step:
        start = len(sequence.ids)
        self._reserve(sequence, start + tokens, limit)
        positions, store = sequence.positions.slice(start, start + tokens), sequence.store
        batch = one_sequence(start, tokens, store.page_size, self.device)
        return Step(positions, batch, store.layers)

    def _reserve(self, sequence: _Sequence, tokens: int, limit: int) -> None:
        """Make room for `tokens` in all, by doubling up to `limit`: memory follows use."""
        store = sequence.store
        held = store.num_pages * store.page_size
        if tokens <= held:
            return
        capacity = min(limit, max(tokens, 2 * held, _LEAST_CAPACITY))
        sequence.store = store.grown(-(-capacity // store.page_size))
        sequence.positions = self._positions(sequence.alpha, capacity)

    def _positions(self, alpha: float, length: int) -> Positions:
        return make_positions(self.decoder.config, alpha, length, self.device)

    # -- sequences and the prefix they share -------------------------------------------------

    def _new_sequence(self, ids: list[int]) -> _Sequence:
        alpha = self._alpha(ids)
        store = KVStore(self.decoder.config, self.kv_dtype, 0, self.device)
        return _Sequence([], alpha, store, self._positions(alpha, 0))

    def _alpha(self, ids: list[int]) -> float:
        config = self.decoder.config
        return ntk_alpha(len(ids), config.trained_context) if config.dynamic_ntk else 1.0

    def _take_sequence(self, ids: list[int]) -> _Sequence:
        """The last sequence cut to the prefix it shares with `ids`, or a new one."""
        sequence, self._idle = self._idle, None
        if sequence is None or sequence.alpha != self._alpha(ids):
            return self._new_sequence(ids)
        # The last prompt token is always fed again: its logits are what starts the answer.
        shared = _common_prefix(sequence.ids, ids[:-1])
        del sequence.ids[shared:]
        return sequence

    # -- the guard against silent nonsense ---------------------------------------------------

    def _check_finite(self, logits: torch.Tensor, ids: list[int]) -> None:
        if bool(torch.isfinite(logits).all()):
            return
        raise NumericsError(
            f"The model computed values that are not finite; they began in {self._culprit(ids)}. "
            "Check the checkpoint (nybble info), or load it with dtype float32."
        )

    def _culprit(self, ids: list[int]) -> str:
        """Run the tokens again from the start, looking at every part's output."""
        sequence = self._new_sequence(ids)
        for begin in range(0, len(ids), self.prefill_chunk):
            chunk = torch.tensor(ids[begin : begin + self.prefill_chunk], device=self.device)
            step = self._step(sequence, len(chunk), len(ids))
            for name, values in self.decoder.trace(chunk, step):
                if not bool(torch.isfinite(values).all()):
                    return name
            sequence.ids.extend(ids[begin : begin + len(chunk)])
        return "a part that does not repeat it"


def _common_prefix(a: list[int], b: list[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
