"""`nybble bench serve`: how a server does under load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import console
from nybble.errors import ConfigError

if TYPE_CHECKING:
    from nybble.bench.load import Load, Shot
    from nybble.bench.workload import Job


@dataclass(frozen=True)
class Traffic:
    """When requests come: at random (rate), or from so many clients one after another."""

    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Requests a second, at random times.")
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Instead: requests at a time, one after another.")
    ] = None
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 100
    seed: Annotated[int, typer.Option(help="Of times, lengths and words.")] = 0


@dataclass(frozen=True)
class Work:
    """What is asked for: lengths as in ShareGPT's chats, unless they are given."""

    prompts: Annotated[
        Path | None, typer.Option(help="Prompts or lengths: JSON Lines, or a ShareGPT file.")
    ] = None
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="One length for all.")] = None
    output_tokens: Annotated[int | None, typer.Option(min=1, help="One length for all.")] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of full length; not every server can.")
    ] = False


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask."""

    model: Annotated[str | None, typer.Option(help="The server's first one if left out.")] = None
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Its key.")] = None
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without an answer.")] = 600.0


def run(
    url: str, endpoint: Endpoint, traffic: Traffic, work: Work, out: Path | None, as_json: bool
) -> None:
    from nybble.bench import serve
    from nybble.bench.load import Load, Target, base_url, first_model

    if traffic.rate is not None and traffic.concurrency is not None:
        raise ConfigError("--rate and --concurrency are two ways to send: give one of them.")
    jobs, about = _jobs(work, traffic)
    base = base_url(url)
    model = endpoint.model or first_model(base, endpoint.api_key)
    target = Target(base, model, endpoint.api_key, work.ignore_eos, endpoint.timeout)
    with console.ProgressBar() as bar:
        load = Load(target, jobs, lambda done, total: bar("Requests", done, total))
        way, shots = _shots(load, traffic)
    report = serve.summarise({"model": model, "requests": way, "lengths": about}, shots)
    if out is not None:
        for path in serve.write(report, shots, out):
            console.note(f"Wrote {path}.")
    typer.echo(json.dumps(report.to_json(), indent=2) if as_json else serve.markdown(report))
    if not report.finished:
        raise ConfigError(f"No request was answered: see what {base} said above, and its log.")


def _jobs(work: Work, traffic: Traffic) -> tuple[list[Job], str]:
    """The requests, and a few words that tell their lengths."""
    from nybble.bench.workload import fixed, read_jobs, sharegpt_like, take

    random, count = Random(traffic.seed), traffic.requests
    given = (work.prompt_tokens is not None, work.output_tokens is not None)
    if work.prompts is not None and any(given):
        raise ConfigError("--prompts has the lengths: leave out --prompt-tokens, --output-tokens.")
    if work.prompts is not None:
        return take(read_jobs(work.prompts, random), count), f"of {work.prompts.name}"
    if not any(given):
        return take(sharegpt_like(random), count), f"as in ShareGPT (seed {traffic.seed})"
    if work.prompt_tokens is None or work.output_tokens is None:
        raise ConfigError("--prompt-tokens and --output-tokens go together: give both.")
    lengths = f"{work.prompt_tokens} and {work.output_tokens}"
    return take(fixed(work.prompt_tokens, work.output_tokens, random), count), lengths


def _shots(load: Load, traffic: Traffic) -> tuple[str, list[Shot]]:
    if traffic.concurrency is not None:
        clients = traffic.concurrency
        return f"from {clients} clients", load.closed_loop(clients)
    rate = traffic.rate or 1.0
    return f"{rate:g} a second", load.open_loop(rate, Random(f"arrivals {traffic.seed}"))
