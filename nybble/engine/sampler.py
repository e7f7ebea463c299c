"""Chooses the next token from one row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nybble.sampling import SamplingParams

# Top-p rarely needs more than this many candidates; when it does, all are sorted.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability (natural log) of a token under the model itself: before penalties and
    temperature, over the real vocabulary. `top`: the asked-for alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The sampling state of one request: its penalties' counts and its random generator."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        vocab_size: int,
        device: torch.device,
        unused_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self._unused = torch.tensor(unused_ids, device=device) if unused_ids else None
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self._penalised = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        if self._penalised:
            self._counts = torch.zeros(vocab_size, device=device)
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            prompt = torch.tensor(prompt_ids, device=device)
            self._seen[prompt[prompt < vocab_size]] = True

    def choose(self, logits: torch.Tensor) -> int:
        """logits fp32 (padded vocab,) -> the token id; padding and unused ids never win."""
        logits = self._real(logits)
        if self._penalised:
            logits = self._penalise(logits)
        token = int(logits.argmax()) if self.params.greedy else self._draw(logits)
        if self._penalised:
            self._counts[token] += 1
            self._seen[token] = True
        return token

    def logprob(self, logits: torch.Tensor, token: int) -> TokenLogprob:
        """The chosen token's log-probability and `params.logprobs` alternatives."""
        logprobs = torch.log_softmax(self._real(logits), dim=-1)
        count = min(self.params.logprobs or 0, self.vocab_size)
        values, ids = logprobs.topk(count)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs[token]), top)

    def _real(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the real vocabulary: without padding, with its gaps out of reach."""
        logits = logits[: self.vocab_size]
        return logits if self._unused is None else logits.index_fill(0, self._unused, -torch.inf)

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        params, seen = self.params, self._seen
        repeated = torch.where(
            logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
        )
        logits = torch.where(seen, repeated, logits)
        logits = logits - params.frequency_penalty * self._counts
        return logits - params.presence_penalty * (self._counts > 0)

    def _draw(self, logits: torch.Tensor) -> int:
        # The shift keeps tiny temperatures finite.
        logits = (logits - logits.max()) / self.params.temperature
        weights, ids = candidates(logits, self.params)
        where = torch.rand((), generator=self.generator, device=logits.device) * weights.sum()
        index = int(torch.searchsorted(weights.cumsum(0), where, right=True))
        return int(ids[min(index, len(ids) - 1)])


def candidates(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens may be drawn: their probabilities (not normalised) and ids.

    top-k, then top-p over what it left (Holtzman et al. 2020: the smallest set that reaches
    p), then min-p. The best token always stays. Best first where top-k or top-p is on.
    """
    if params.top_k == 0 and params.top_p >= 1:
        ids = torch.arange(len(logits), device=logits.device)
        return _min_p(torch.softmax(logits, dim=-1), ids, params.min_p)
    size = min(params.top_k or len(logits), len(logits))
    total = torch.logsumexp(logits.topk(size).values if params.top_k else logits, dim=-1)
    values, ids = logits.topk(size if params.top_p >= 1 else min(size, _FIRST_CANDIDATES))
    if len(ids) < size and float((values - total).exp().sum()) < params.top_p:
        values, ids = logits.topk(size)
    probabilities = (values - total).exp()
    before = probabilities.cumsum(0) - probabilities
    keep = before < params.top_p
    keep[0] = True
    return _min_p(probabilities[keep], ids[keep], params.min_p)


def _min_p(
    probabilities: torch.Tensor, ids: torch.Tensor, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if min_p == 0:
        return probabilities, ids
    keep = probabilities >= min_p * probabilities.max()
    return probabilities[keep], ids[keep]
