"""What quantising cost: perplexity of one model, and the distance of two models' predictions.

The text is tokenised whole, without control tokens, and cut into windows that do not overlap.
In each window every token but the first is predicted from the tokens before it in the window.
A tail shorter than a window is left out, unless the text is shorter than one window.
Perplexity is exp of the mean negative log-likelihood over all predicted tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.checkpoint import Checkpoint, read_json
from nybble.errors import CheckpointError, ConfigError
from nybble.gptq.output import REPORT_NAME
from nybble.llm import LLM
from nybble.outputs import no_tokenizer

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Perplexity:
    """`tokens` counts the predicted ones; `bits_per_token` is log2 of the perplexity."""

    perplexity: float
    tokens: int
    window: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bits_per_token": math.log2(self.perplexity)}


@dataclass(frozen=True)
class Comparison:
    """A quantised model beside its base, on the same windows.

    ratio: quant's perplexity over base's; window_ratios the same in each window. KL divergence is
    that of quant's predictions from base's, sum p (log p - log q), in nats a token;
    top1_agreement the share of tokens where both think the same one likeliest. layer_errors: from
    the quantiser's report, the mean relative error of each layer's linears.
    """

    base: Perplexity
    quant: Perplexity
    ratio: float
    window_ratios: tuple[float, ...]
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    base_bytes: int
    quant_bytes: int
    layer_errors: tuple[float, ...] = ()

    @property
    def ratio_error(self) -> float | None:
        """The standard error of `ratio`, the windows being paired; None for a single window."""
        return mean_ratio(self.window_ratios)[1]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ratio_error": self.ratio_error,
            "base": self.base.to_json(),
            "quant": self.quant.to_json(),
        }


def mean_ratio(window_ratios: Sequence[float]) -> tuple[float, float | None]:
    """The geometric mean of ratios and its standard error, from the spread between windows."""
    logs = [math.log(ratio) for ratio in window_ratios]
    mean = math.exp(statistics.fmean(logs))
    if len(logs) < 2:
        return mean, None
    return mean, mean * statistics.stdev(logs) / math.sqrt(len(logs))


def perplexity(
    llm: LLM, text: str, window: int = DEFAULT_WINDOW, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a model on a text. ConfigError: no two tokens to predict from each other."""
    losses = []
    windows = split(llm, text, window)
    for done, ids in enumerate(windows, start=1):
        losses.append(_losses(llm.logits(ids), ids))
        if progress is not None:
            progress(done, len(windows))
    return _perplexity(torch.cat(losses), len(windows[0]))


def compare(
    base: LLM, quant: LLM, text: str, window: int = DEFAULT_WINDOW, progress: Progress | None = None
) -> Comparison:
    """Both models on the same tokens. ConfigError where their vocabularies or ids differ."""
    windows = split(base, text, window)
    if split(quant, text, window) != windows:
        raise ConfigError(
            "The two models read this text as different tokens: compare a model with "
            "its own quantised form."
        )
    return compare_windows(base, quant, windows, progress)


def compare_windows(
    base: LLM, quant: LLM, windows: Sequence[Sequence[int]], progress: Progress | None = None
) -> Comparison:
    """Both models on the same windows of ids, of equal length."""
    errors = layer_errors(quant.folder)
    rows = []
    for done, ids in enumerate(windows, start=1):
        rows.append(_distances(base.logits(ids), quant.logits(ids), ids))
        if progress is not None:
            progress(done, len(windows))
    base_loss, quant_loss, kl, agree = (torch.cat(parts) for parts in zip(*rows, strict=True))
    window = len(windows[0])
    first, second = _perplexity(base_loss, window), _perplexity(quant_loss, window)
    differences = (quant_loss - base_loss).double().view(len(windows), -1).mean(1)
    return Comparison(
        base=first,
        quant=second,
        ratio=second.perplexity / first.perplexity,
        window_ratios=tuple(differences.exp().tolist()),
        kl_mean=float(kl.mean()),
        kl_p99=float(torch.quantile(kl[: 2**24], 0.99)),
        top1_agreement=float(agree.double().mean()),
        base_bytes=Checkpoint.open(base.folder).nbytes,
        quant_bytes=Checkpoint.open(quant.folder).nbytes,
        layer_errors=errors,
    )


def split(llm: LLM, text: str, window: int) -> list[list[int]]:
    """The windows of token ids on which everything here is measured."""
    if window < 2:
        raise ConfigError(f"window is {window}: give at least 2 tokens.")
    if llm.tokenizer is None:
        raise no_tokenizer()
    ids = llm.tokenizer.encode(text)
    if len(ids) < 2:
        raise ConfigError("The text has fewer than two tokens: give a longer one.")
    full = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    return full or [ids]


def layer_errors(folder: Path) -> tuple[float, ...]:
    """The mean relative error of each layer, where nybble's quantiser left its report.

    CheckpointError: that file holds something else.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        return ()
    by_layer: dict[int, list[float]] = {}
    try:
        for module in read_json(path)["modules"]:
            by_layer.setdefault(int(module["layer"]), []).append(float(module["error"]))
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is no report of nybble's quantiser: move it away, or quantise again."
        ) from error
    return tuple(sum(errors) / len(errors) for _, errors in sorted(by_layer.items()))


def _perplexity(losses: torch.Tensor, window: int) -> Perplexity:
    return Perplexity(math.exp(float(losses.double().mean())), losses.numel(), window)


def _losses(logits: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """-log p of each token but the first: logits (tokens, vocab) -> (tokens - 1,)."""
    following = torch.tensor(ids[1:], device=logits.device)
    return torch.nn.functional.cross_entropy(logits[:-1], following, reduction="none").cpu()


def _distances(
    base: torch.Tensor, quant: torch.Tensor, ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of both, KL divergence and agreement for each predicted token."""
    if base.shape != quant.shape:
        raise ConfigError(
            f"The models tell {base.shape[1]} and {quant.shape[1]} tokens apart: compare a model "
            "with its own quantised form."
        )
    kl, agree = [], []
    for p, q in _pieces(base[:-1], quant[:-1].to(base.device)):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu())
        agree.append((p.argmax(-1) == q.argmax(-1)).cpu())
    return _losses(base, ids), _losses(quant, ids), torch.cat(kl), torch.cat(agree)


def _pieces(
    base: torch.Tensor, quant: torch.Tensor, rows: int = 128
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A vocabulary is wide: a few rows at a time keep the temporaries small."""
    return zip(torch.split(base, rows), torch.split(quant, rows), strict=True)
