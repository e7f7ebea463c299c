"""GPTQ and its refinements for one matrix: tensors in, tensors out, no model and no file.

A linear y = x W is replaced by x Q, Q on a grid, so that sum |x W - x Q|^2 over the calibration
inputs x is small: tr(E' H E) with E = W - Q and H = x'x. Three steps, each on all outputs at once:

1. a scale and zero for every group, by weighted search (grid.py);
2. rounding, one input after another, each carrying the errors of those before it (Frantar et al.
   2022, "GPTQ", in the equivalent form of Chee et al. 2023, "QuIP", section 4.1);
3. sweeps: scales refitted by least squares, then every code moved to its optimum given all
   others (coordinate descent, as in Behdin et al. 2023, "QuantEase").

Steps 2 and 3 are one routine, `round_with_feedback`, given two different matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.config import QuantConfig
from nybble.errors import ConfigError, NumericsError
from nybble.gptq.grid import fp16_scale, round_to_grid, search_grid
from nybble.kernels.cuda import rounding as cuda_rounding

_BLOCK = 64
_MOST_DAMP = 1.0
_GRAM_NUMBERS = 2**26  # of the equations for the scales that are in memory at a time


@dataclass(frozen=True)
class SolverOptions:
    """damp: added to the Hessian's diagonal, relative to its mean; raised when that is too little.

    act_order: round the inputs with the largest activations first. Scales are fixed before, so
    the file's groups stay as they are (`desc_act` of the QuantConfig is what regroups inputs).
    sweeps: rounds of refitting and coordinate descent after GPTQ itself.
    """

    damp: float = 0.01
    act_order: bool = True
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.damp <= _MOST_DAMP:
            raise ConfigError(f"damp is {self.damp}: give a number above 0, at most {_MOST_DAMP}.")
        if self.sweeps < 0:
            raise ConfigError(f"sweeps is {self.sweeps}: give at least 0.")


@dataclass(frozen=True)
class Solution:
    """A quantised matrix of K inputs and N outputs in G groups.

    codes uint8 (K, N), scales fp16 (G, N), zeros uint8 (G, N), g_idx int64 (K,), the group of
    each input. error: |x W - x Q|^2 / |x W|^2 over the calibration inputs.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    error: float

    def dequantize(self) -> torch.Tensor:
        """fp32 (K, N)."""
        codes = self.codes.float() - self.zeros.float()[self.g_idx]
        return codes.mul_(self.scales.float()[self.g_idx])


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    config: QuantConfig,
    options: SolverOptions = SolverOptions(),
) -> Solution:
    """Quantise weight (K, N) against hessian (K, K) = x'x, in the Hessian's dtype.

    Inputs that are always zero are rounded to nearest. Raises NumericsError for NaN or Inf in
    either, and for a Hessian that no damping makes positive definite.
    """
    target = weight.to(hessian.dtype)
    _require_finite(target, "weight")
    damped = damp(hessian, options.damp)
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    g_idx = _groups(order, config)
    if not (options.act_order or config.desc_act):
        order = torch.arange(len(order), device=order.device)
    scales, zeros = _grids(target, damped.diagonal(), g_idx, config)
    rounding = _Rounding(target, damped, order, g_idx, zeros, 2**config.bits - 1)
    codes, errors = rounding.gptq(scales)
    for _ in range(options.sweeps):
        scales = rounding.refit(codes, scales)
        codes, errors = rounding.descend(codes, scales)
    return Solution(
        codes.to(torch.uint8),
        scales.to(torch.float16),
        zeros.to(torch.uint8),
        g_idx,
        _energy(errors, hessian) / max(_energy(target, hessian), 1e-30),
    )


def corrected_target(
    weight: torch.Tensor, hessian: torch.Tensor, shift: torch.Tensor, options: SolverOptions
) -> torch.Tensor:
    """The real-valued weight that best repairs, in this linear, what earlier ones got wrong.

    The quantised model feeds inputs q where the original feeds x, and its residual stream lacks
    r. Best is the least-squares solution of q V = x W + r: V = W + H^-1 q'((x - q) W + r) with
    H = q'q. `shift` (K, N) is q'((x - q) W + r). Rounding V against H then minimises the whole
    error; cf. Li et al. 2025, "GPTAQ", and Zhang et al. 2025, "Qronos".
    """
    factor: torch.Tensor = torch.linalg.cholesky(damp(hessian, options.damp))
    return weight.to(hessian.dtype) + torch.cholesky_solve(shift, factor)


def damp(hessian: torch.Tensor, amount: float) -> torch.Tensor:
    """hessian + the smallest of amount * 1, 10, 100 ... times its mean that makes it definite."""
    _require_finite(hessian, "calibration inputs")
    mean = hessian.diagonal().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    dead = hessian.diagonal() <= 0
    while amount <= _MOST_DAMP:
        damped = hessian.clone()
        damped.diagonal().add_(amount * mean)
        damped.diagonal()[dead] = mean
        if int(torch.linalg.cholesky_ex(damped).info) == 0:
            return damped
        amount *= 10
    raise NumericsError(
        "The calibration inputs give no positive definite Hessian: use more or other text."
    )


def gptq_feedback(hessian: torch.Tensor) -> torch.Tensor:
    """Strictly upper A with hessian = (I + A) D (I + A)', D diagonal: input k corrects by column k.

    tr(E' H E) = sum_k D_k |E_k + sum_{j<k} A_jk E_j|^2, so rounding W_k + sum_{j<k} A_jk E_j
    minimises term k.
    """
    upper: torch.Tensor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return (upper / upper.diagonal()).triu_(1)


def descent_feedback(hessian: torch.Tensor) -> torch.Tensor:
    """F with zero diagonal: W_k + sum_j F_jk E_j is the best value of input k, given the others."""
    feedback = hessian / hessian.diagonal()
    feedback.diagonal().zero_()
    return feedback


def round_with_feedback(
    weight: torch.Tensor,
    feedback: torch.Tensor,
    errors: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    top: int,
) -> torch.Tensor:
    """Round each row k of weight (K, N) at weight[k] + sum_j feedback[j, k] * errors[j].

    scales and zeros (G, N); groups int64 (K,): the group of each row. `errors` (K, N) is weight -
    rounded, updated in place as rows are done. Returns the codes (K, N) as floats.
    """
    codes = torch.empty_like(weight)
    round_rows = cuda_rounding.round_rows if weight.is_cuda else _round_rows
    for start in range(0, len(weight), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(weight)))
        # What errors outside the block contribute is one product; inside, row by row.
        target = weight[block] + feedback[:, block].t() @ errors
        round_rows(
            target,
            weight[block],
            errors[block],
            codes[block],
            feedback[block, block],
            scales[groups[block]],
            zeros[groups[block]],
            top,
        )
    return codes


def _round_rows(
    target: torch.Tensor,
    weight: torch.Tensor,
    errors: torch.Tensor,
    codes: torch.Tensor,
    feedback: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    top: int,
) -> None:
    """The rows of one block in their order; errors and codes are written."""
    for k in range(len(weight)):
        code = round_to_grid(target[k], scales[k], zeros[k], top)
        error = weight[k] - scales[k] * (code - zeros[k])
        target[k + 1 :].addr_(feedback[k, k + 1 :], error - errors[k])
        errors[k], codes[k] = error, code


@dataclass(frozen=True)
class _Rounding:
    """What the steps share: the matrix to approximate (K, N), and the order of its inputs."""

    target: torch.Tensor
    hessian: torch.Tensor
    order: torch.Tensor
    g_idx: torch.Tensor
    zeros: torch.Tensor  # (G, N)
    top: int

    def gptq(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pass(gptq_feedback(self._ordered), torch.zeros_like(self.target), scales)

    def descend(
        self, codes: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        levels = codes - self.zeros[self.g_idx]
        errors = self.target - scales[self.g_idx] * levels
        return self._pass(descent_feedback(self._ordered), errors, scales)

    def refit(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The scales (G, N) that fit the codes best, all groups of an output together."""
        # Inputs group by group, the last group filled up with rows of zeros.
        order, count = torch.argsort(self.g_idx, stable=True), len(scales)
        size = int(torch.bincount(self.g_idx).max())
        levels = torch.zeros(count * size, codes.shape[1]).to(codes)
        levels[: len(order)] = (codes - self.zeros[self.g_idx])[order]
        hessian = torch.zeros(count * size, count * size).to(codes)
        hessian[: len(order), : len(order)] = self.hessian[order][:, order]
        right = torch.zeros_like(levels)
        right[: len(order)] = (self.hessian @ self.target)[order]
        goal = (right * levels).view(count, size, -1).sum(1).t()
        width = max(1, _GRAM_NUMBERS // count**2)
        parts = zip(torch.split(levels, width, 1), torch.split(goal, width), strict=True)
        fitted = torch.cat([_fit(hessian, *part) for part in parts]).t()
        keep = ~fitted.isfinite() | (fitted == 0)
        return torch.where(keep, scales, fp16_scale(fitted)).contiguous()

    @property
    def _ordered(self) -> torch.Tensor:
        return self.hessian[self.order][:, self.order]

    def _pass(
        self, feedback: torch.Tensor, errors: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        order = self.order
        groups, errors = self.g_idx[order], errors[order].contiguous()
        sorted_codes = round_with_feedback(
            self.target[order], feedback, errors, scales, self.zeros, groups, self.top
        )
        codes, unsorted = torch.empty_like(sorted_codes), torch.empty_like(errors)
        codes[order], unsorted[order] = sorted_codes, errors
        return codes, unsorted


def _fit(hessian: torch.Tensor, levels: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The best scales (N, G) of levels (K, N), K in G blocks; 0 where a block has no nonzero level.

    goal (N, G): the right side of each output's normal equations.
    """
    count = goal.shape[1]
    size = len(levels) // count
    gram = levels.new_empty(len(goal), count, count)
    for g in range(count):
        rows = slice(g * size, (g + 1) * size)
        reach = hessian[:, rows] @ levels[rows]  # (K, N)
        gram[:, :, g] = reach.mul_(levels).view(count, size, -1).sum(1).t()
    empty = gram.diagonal(dim1=1, dim2=2) <= 0
    gram.diagonal(dim1=1, dim2=2)[empty] = 1.0
    fitted: torch.Tensor = torch.linalg.solve(gram, goal)
    return fitted.masked_fill_(empty, 0)


def _groups(order: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    """int64 (K,): the group of each input; with desc_act, of its rank in `order`."""
    rank = torch.arange(len(order), device=order.device)
    size = len(order) if config.group_size == -1 else config.group_size
    if not config.desc_act:
        return rank // size
    g_idx = torch.empty_like(rank)
    g_idx[order] = rank // size
    return g_idx


def _grids(
    target: torch.Tensor, weights: torch.Tensor, g_idx: torch.Tensor, config: QuantConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    grids = []
    for group in range(int(g_idx.max()) + 1):
        rows = torch.nonzero(g_idx == group).flatten()
        grids.append(search_grid(target[rows], weights[rows], config))
    scales, zeros = zip(*grids, strict=True)
    return torch.stack(scales), torch.stack(zeros)


def _energy(matrix: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(matrix' H matrix): the squared output that `matrix` makes of the calibration inputs."""
    return float((matrix * (hessian @ matrix)).sum())


def _require_finite(values: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(
            f"The {what} hold NaN or Inf, so nothing can be fitted to them: check the checkpoint."
        )
