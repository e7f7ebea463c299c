"""Chooses the next tokens from rows of logits, one row a request.

A row's choice depends on that row, its request's settings and its seed alone: each operation
works along the row, so the company a request is in never changes its answer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from nybble.engine.constraint import Constraint, allowed_tokens
from nybble.errors import RequestError
from nybble.sampling import SamplingParams

# Top-p rarely needs more than this many candidates; when it does, it looks at more and more.
_FIRST_CANDIDATES, _MORE_CANDIDATES = 256, 16
# Smaller temperatures would overflow, and choose the best token all the same.
_LEAST_TEMPERATURE = 1e-20


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural log) of a token under the model itself: before penalties and
    temperature, over the real vocabulary. `top`: the asked-for alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SamplingState:
    """What sampling remembers of one request: random numbers, penalties, bias, constraint.

    The random numbers are drawn on the CPU, so that a seed means the same on every device. Tensors
    on the device are made at the first token, by whoever runs the steps: whoever hands in the
    request must not wait for a device that is busy.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        self._prompt_ids, self._vocab_size, self._device = prompt_ids, vocab_size, device
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._penalised = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        last = max(params.logit_bias or (0,))
        if last >= vocab_size:
            raise RequestError(
                f"logit_bias names the token {last}: this model has 0 to {vocab_size - 1}.",
                "logit_bias",
            )

    @property
    def changes_logits(self) -> bool:
        return self._penalised or bool(self.params.logit_bias)

    def random(self) -> float:
        return float(torch.rand((), generator=self._generator))

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (vocab,) -> the same with the request's penalties and bias."""
        if self._penalised:
            logits = self._penalties.apply(logits)
        return logits + self._bias if self.params.logit_bias else logits

    def count(self, token: int) -> None:
        if self._penalised:
            self._penalties.count(token)

    @cached_property
    def _penalties(self) -> _Penalties:
        seen = [token for token in dict.fromkeys(self._prompt_ids) if token < self._vocab_size]
        return _Penalties(self.params, seen, self._device)

    @cached_property
    def _bias(self) -> torch.Tensor:
        """The request's logit_bias as (vocab,)."""
        given = self.params.logit_bias or {}
        values = torch.tensor(list(given.values()), dtype=torch.float32, device=self._device)
        bias = torch.zeros(self._vocab_size, device=self._device)
        bias[torch.tensor(list(given), device=self._device)] = values
        return bias


class _Penalties:
    """What a request's penalties take from the logits of the ids that it has met.

    seen: those of the prompt, each once. Only they are touched: the vocabulary is far longer.
    """

    def __init__(self, params: SamplingParams, seen: Sequence[int], device: torch.device) -> None:
        self._params = params
        self._ids = torch.tensor(seen, dtype=torch.int64, device=device)
        self._counts = torch.zeros(len(seen), device=device)  # in the answer
        self._rows = {token: row for row, token in enumerate(seen)}

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        params, found, counts = self._params, logits[self._ids], self._counts
        penalty = params.repetition_penalty
        found = torch.where(found > 0, found / penalty, found * penalty)
        found = found - params.frequency_penalty * counts
        found = found - params.presence_penalty * (counts > 0)
        return logits.index_copy(0, self._ids, found)

    def count(self, token: int) -> None:
        row = self._rows.setdefault(token, len(self._rows))
        if row == len(self._ids):
            self._ids = torch.cat([self._ids, self._ids.new_tensor([token])])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(1)])
        self._counts[row] += 1


class Sampler:
    """Chooses among the ids of a vocabulary: neither its padding nor `unused_ids` ever win."""

    def __init__(
        self, vocab_size: int, device: torch.device, unused_ids: Sequence[int] = ()
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._unused = torch.tensor(unused_ids, device=device) if unused_ids else None

    def state(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        constraint: Constraint | None = None,
    ) -> SamplingState:
        """The state of a new request."""
        return SamplingState(params, prompt_ids, self.vocab_size, self.device, constraint)

    def choose(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
        """logits fp32 (requests, padded vocab) -> the next token of each request."""
        logits = self._constrained(self._changed(self._real(logits), states), states)
        best = logits.argmax(dim=-1)
        drawn = [row for row, state in enumerate(states) if not state.params.greedy]
        if drawn:
            params = [states[row].params for row in drawn]
            random = torch.tensor([states[row].random() for row in drawn], device=self.device)
            rows = logits if len(drawn) == len(states) else logits[drawn]
            best[drawn] = draw(rows, params, random)
        tokens: list[int] = best.tolist()
        for state, token in zip(states, tokens, strict=True):
            state.count(token)
        return tokens

    def logprobs(
        self, logits: torch.Tensor, tokens: Sequence[int], count: int
    ) -> list[TokenLogprob]:
        """logits fp32 (tokens, padded vocab): each token's log-probability, and the best `count`.

        A token of the padding, which only a prompt can hold, has none: -inf.
        """
        logprobs = torch.log_softmax(self._real(logits), dim=-1)
        values, ids = (t.tolist() for t in logprobs.topk(min(count, self.vocab_size)))
        chosen = torch.tensor(tokens, device=logits.device)
        there = chosen.clamp(max=self.vocab_size - 1)
        own = logprobs.gather(-1, there[:, None])[:, 0]
        own = own.masked_fill(chosen >= self.vocab_size, -torch.inf)
        return [
            TokenLogprob(token, value, tuple(zip(best, their_values, strict=True)))
            for token, value, best, their_values in zip(
                tokens, own.tolist(), ids, values, strict=True
            )
        ]

    def _real(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the real vocabulary: without padding, with its gaps out of reach."""
        logits = logits[..., : self.vocab_size]
        return logits if self._unused is None else logits.index_fill(-1, self._unused, -torch.inf)

    def _constrained(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
        """The logits with what a row's constraint rules out put out of reach."""
        rows = [row for row, state in enumerate(states) if state.constraint is not None]
        if not rows:
            return logits
        constraints = [s.constraint for s in states if s.constraint is not None]
        allowed = torch.ones_like(logits, dtype=torch.bool)
        allowed[rows] = allowed_tokens(constraints, self.vocab_size, self.device)
        return logits.masked_fill(~allowed, -torch.inf)

    @staticmethod
    def _changed(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
        if not any(state.changes_logits for state in states):
            return logits
        rows = zip(logits, states, strict=True)
        return torch.stack([s.change(row) if s.changes_logits else row for row, s in rows])


def draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], random: torch.Tensor
) -> torch.Tensor:
    """One token of each row at the row's temperature: logits (rows, vocab) -> ids (rows,).

    random (rows,), uniform in [0, 1): where in the candidates' cumulated probability to look.
    """
    temperatures = [max(p.temperature, _LEAST_TEMPERATURE) for p in params]
    probabilities = torch.softmax(logits / _column(temperatures, logits), dim=-1)
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for row, p in enumerate(params):
        groups[_first_look(p, logits.shape[-1])].append(row)
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for (size, _), rows in groups.items():
        chosen = probabilities if len(rows) == len(params) else probabilities[rows]
        tokens[rows] = _draw_alike(chosen, [params[row] for row in rows], random[rows], size)
    return tokens


def candidates(
    probabilities: torch.Tensor, params: Sequence[SamplingParams], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens may be drawn: weights (rows, size), 0 for those that may not, and their ids.

    top-k, then top-p over what it left (Holtzman et al. 2020: the smallest set that reaches
    p), then min-p. The best token always stays. probabilities (rows, vocab) sum to 1; the best
    `size` of them are looked at, which is top_k where that is on. Best first, but in the order
    of their ids where neither top-k nor top-p is on.
    """
    if not any(p.top_k or p.top_p < 1 for p in params):
        ids = torch.arange(size, device=probabilities.device).expand_as(probabilities)
        return _min_p(probabilities, params), ids
    weights, ids = probabilities.topk(size)
    totals = weights.sum(dim=-1, keepdim=True)
    limited = _column([float(p.top_k > 0) for p in params], weights) > 0
    mass = _column([p.top_p if p.top_p < 1 else math.inf for p in params], weights) * torch.where(
        limited, totals, 1.0
    )
    keep = weights.cumsum(dim=-1) - weights < mass
    keep[:, 0] = True
    return _min_p(weights * keep, params), ids


def _first_look(params: SamplingParams, vocab: int) -> tuple[int, str]:
    """How many candidates to begin with, and why: rows that agree are drawn together."""
    if params.top_k:
        return min(params.top_k, vocab), "top_k"
    if params.top_p < 1:
        return min(_FIRST_CANDIDATES, vocab), "top_p"
    return vocab, "all"


def _draw_alike(
    probabilities: torch.Tensor, params: Sequence[SamplingParams], random: torch.Tensor, size: int
) -> torch.Tensor:
    """One token of each row (rows,), all from equally many candidates."""
    weights, ids = candidates(probabilities, params, size)
    cumulated = weights.cumsum(dim=-1)
    total = cumulated[:, -1:]
    # Below the total, so that what is found there has a weight.
    where = torch.minimum(random[:, None] * total, total.nextafter(torch.zeros_like(total)))
    # A row of NaN finds a place behind the last one: the other rows shall not fall with it.
    found = torch.searchsorted(cumulated, where, right=True).clamp_(max=size - 1)
    tokens = ids.gather(-1, found).squeeze(-1)
    vocab = probabilities.shape[-1]
    if size < vocab and not params[0].top_k:
        # Where even the last candidate stays, there are more: a flat distribution.
        flat = weights[:, -1].nonzero().flatten().tolist()
        if flat:
            more = min(size * _MORE_CANDIDATES, vocab)
            others = [params[row] for row in flat]
            tokens[flat] = _draw_alike(probabilities[flat], others, random[flat], more)
    return tokens


def _min_p(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    if not any(p.min_p for p in params):
        return weights
    least = _column([p.min_p for p in params], weights) * weights.amax(dim=-1, keepdim=True)
    return torch.where(weights >= least, weights, 0.0)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
