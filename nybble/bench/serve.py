"""What a load test measured: throughput, waiting times and errors, as table, JSON and plot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nybble.bench.load import Shot
from nybble.errors import ConfigError

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Spread:
    """Seconds: the mean and three percentiles of `count` values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        return cls(
            len(values), float(np.mean(values)), *map(float, np.percentile(values, _PERCENTILES))
        )


@dataclass(frozen=True)
class Failure:
    """How many requests failed in one way, and what the first of them was told."""

    count: int
    example: str


@dataclass(frozen=True)
class Report:
    """One load test. Rates are over `seconds`, from the first arrival to the last end.

    tokens are the server's own counts, of finished requests. first_token and whole count from
    when a request was due; between_tokens from one piece of text to the next.
    """

    about: dict[str, Any]
    requests: int
    finished: int
    seconds: float
    prompt_tokens: int
    new_tokens: int
    most_in_flight: int
    first_token: Spread | None
    between_tokens: Spread | None
    whole: Spread | None
    failures: dict[str, Failure]

    @property
    def request_rate(self) -> float:
        return self.finished / self.seconds

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / self.seconds

    @property
    def token_rate(self) -> float:
        return self.new_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "requests_per_second": self.request_rate,
            "prompt_tokens_per_second": self.prompt_rate,
            "new_tokens_per_second": self.token_rate,
        }


def summarise(about: dict[str, Any], shots: Sequence[Shot]) -> Report:
    """about: what was asked for, in words that a reader of the report understands."""
    good = [shot for shot in shots if shot.error is None]
    failed: dict[str, list[Shot]] = defaultdict(list)
    for shot in shots:
        if shot.error is not None:
            failed[shot.error].append(shot)
    return Report(
        about=about,
        requests=len(shots),
        finished=len(good),
        seconds=max(shot.ended for shot in shots),
        prompt_tokens=sum(shot.prompt_tokens for shot in good),
        new_tokens=sum(shot.new_tokens for shot in good),
        most_in_flight=max(count for _, count in in_flight(shots)),
        first_token=Spread.of(_first_tokens(good)),
        between_tokens=Spread.of(_gaps(good)),
        whole=Spread.of([shot.ended - shot.due for shot in good]),
        failures={kind: Failure(len(some), some[0].detail) for kind, some in failed.items()},
    )


def in_flight(shots: Sequence[Shot]) -> list[tuple[float, int]]:
    """(seconds, requests that are due and have not ended) after each change."""
    changes = sorted([(shot.due, 1) for shot in shots] + [(shot.ended, -1) for shot in shots])
    counts = np.cumsum([change for _, change in changes]).tolist()
    return [(when, count) for (when, _), count in zip(changes, counts, strict=True)]


def _first_tokens(shots: Sequence[Shot]) -> list[float]:
    return [shot.tokens_at[0] - shot.due for shot in shots if shot.tokens_at]


def _gaps(shots: Sequence[Shot]) -> list[float]:
    return [after - before for shot in shots for before, after in pairwise(shot.tokens_at)]


# -- for people ------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    about = ", ".join(f"{name} {value}" for name, value in report.about.items())
    lines = [
        f"{about}.",
        "",
        f"{report.finished:,} of {report.requests:,} requests finished in {report.seconds:.1f} s, "
        f"at most {report.most_in_flight:,} at a time: {report.request_rate:.2f} requests/s, "
        f"{report.prompt_rate:,.0f} prompt tokens/s, {report.token_rate:,.0f} new tokens/s.",
    ]
    spreads = [
        f"| {title} | {_row(spread)} |"
        for title, spread in (
            ("to the first token", report.first_token),
            ("from token to token", report.between_tokens),
            ("whole request", report.whole),
        )
        if spread is not None
    ]
    if spreads:
        head = ["", "| milliseconds | mean | 50 % | 90 % | 99 % |", "|---|---:|---:|---:|---:|"]
        lines += head + spreads
    if report.failures:
        lines += ["", "| failed | requests | the first was told |", "|---|---:|---|"]
        lines += [
            f"| {kind} | {failure.count:,} | {_cell(failure.example)} |"
            for kind, failure in report.failures.items()
        ]
    return "\n".join(lines)


def _row(spread: Spread) -> str:
    values = (spread.mean, spread.p50, spread.p90, spread.p99)
    return " | ".join(f"{value * 1e3:,.1f}" for value in values)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def write(report: Report, shots: Sequence[Shot], folder: Path) -> list[Path]:
    """serve.json, serve.md and serve.png in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"serve.{ending}" for ending in ("json", "md", "png")]
    paths[0].write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(report) + "\n", encoding="utf-8")
    plot(report, shots, paths[2])
    return paths


def plot(report: Report, shots: Sequence[Shot], path: Path) -> None:
    """How waiting times are spread, and how the server stood the load as time went on."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("The plot needs matplotlib: run `pip install '.[eval]'`.") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    spread, course = figure.subplots(1, 2)
    good = [shot for shot in shots if shot.error is None]
    _draw_spread(spread, good)
    _draw_course(course, shots)
    figure.suptitle(", ".join(f"{name} {value}" for name, value in report.about.items()), size=10)
    figure.savefig(path, dpi=130)


def _draw_spread(axes: Any, good: Sequence[Shot]) -> None:
    for label, values in (
        ("from token to token", _gaps(good)),
        ("to the first token", _first_tokens(good)),
        ("whole request", [shot.ended - shot.due for shot in good]),
    ):
        if values:
            shares = np.arange(1, len(values) + 1) / len(values) * 100
            axes.step(np.sort(np.maximum(values, 1e-4)), shares, where="post", label=label)
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("% that took no longer")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    if good:
        axes.legend()


def _draw_course(axes: Any, shots: Sequence[Shot]) -> None:
    from matplotlib.ticker import MaxNLocator

    times, counts = zip(*in_flight(shots), strict=True)
    axes.step(times, counts, where="post", color="#2b6cb0", label="requests in flight")
    failed = [shot for shot in shots if shot.error is not None]
    if failed:
        axes.plot([shot.ended for shot in failed], [0] * len(failed), "x", color="#c2345a")
        axes.plot([], [], "x", color="#c2345a", label="failed")
    axes.set_xlabel("seconds since the beginning")
    axes.set_ylabel("requests in flight")
    axes.set_ylim(bottom=-0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
