"""What `nybble eval` does with its options: benchmarks made ready, run, and summed up."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.cli import console
from nybble.cli.extras import require
from nybble.cli.folders import make_folder
from nybble.errors import ConfigError, NybbleError
from nybble.paths import local_folder

if TYPE_CHECKING:
    from nybble.cli.evaluate import How, What
    from nybble.cli.options import Running
    from nybble.eval.answerers import Answerer
    from nybble.eval.task import Settings, Summary, Task


_FEW = 10  # parts of a score that are printed


def run(name: str, model: str, what: What, how: How, running: Running, as_json: bool) -> None:
    """Run one benchmark or a group. What can be refused is, before a model is loaded."""
    from nybble.eval.runner import RunFolder, run_task

    _refuse_contradictions(name, what, how, running)
    path, about = how.out or _default_folder(model, what), _about(model, what, how, running)
    RunFolder(path, about)  # refuses the folder of another run
    tasks = _ready(_selected(name, what), name, what.settings())
    make_folder(path)
    answerer, found = _answerer(model, how, running)
    # Once more: lengths count in the tokens of this model now.
    tasks = _ready([task.name for task in tasks], name, what.settings(answerer))
    folder = RunFolder(path, {**about, **found})
    summaries: dict[str, Summary] = {}
    try:
        for task in tasks:
            with console.ProgressBar() as bar:
                summaries[task.name] = run_task(
                    task,
                    answerer,
                    folder,
                    limit=what.limit,
                    batch=how.batch,
                    seed=how.seed,
                    progress=_Shown(bar),
                )
    except KeyboardInterrupt:
        console.note(f"What is finished is kept in {path}: run it again to go on.")
        raise
    show(summaries, as_json, single=False)
    console.note(f"Answers and results: {path}. Next: nybble eval report {path}")


class _Shown:
    """A bar on a terminal, else a line now and then, for whoever reads the log of a long run."""

    _EVERY = 60.0

    def __init__(self, bar: console.ProgressBar) -> None:
        self._bar = bar
        self._next = time.monotonic() + self._EVERY

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar(what, done, total)
        if not sys.stderr.isatty() and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._EVERY
            console.note(f"{what}: {done:,} of {total:,}")


def _refuse_contradictions(name: str, what: What, how: How, running: Running) -> None:
    from nybble.cli.options import Running as Defaults

    what.settings()
    how.decoding()
    if how.batch < 1:
        raise ConfigError("--batch must be at least 1.")
    if what.samples > 1 and not how.temperature:
        raise ConfigError("--samples above 1 needs --temperature: greedy answers are all alike.")
    if (what.lengths or what.depths) and name not in ("needle", "all"):
        raise ConfigError("--lengths and --depths go with the needle only: leave them out.")
    if how.endpoint and running != Defaults():
        raise ConfigError("--endpoint goes without --device and the like: its server has them.")


def _selected(name: str, what: What) -> tuple[str, ...]:
    """The benchmarks of a command; the subjects of L-Eval are benchmarks themselves."""
    from nybble.eval.tasks import expand

    if name != "leval" or not what.names:
        return expand(name)
    return tuple(task for kind in what.names for task in expand(f"leval-{kind}"))


def _ready(names: Sequence[str], command: str, settings: Settings) -> list[Task]:
    """The benchmarks with their data and a first prompt made; of several, those that can be."""
    from nybble.eval.tasks import make_task

    ready = []
    for name in names:
        try:
            task = make_task(name, _own(name, command, settings))
            require(name, "eval", *task.packages)
            for item in task.load()[:1]:
                task.prompt(item)
        except NybbleError as error:
            if len(names) == 1:
                raise
            console.note(f"{name} is left out. {error}")
        else:
            ready.append(task)
    if not ready:
        raise ConfigError("No benchmark is left to run: change what is said above.")
    return ready


def _own(name: str, command: str, settings: Settings) -> Settings:
    """What of a group's settings a benchmark of it takes."""
    if command == "leval":  # its subjects were benchmarks of their own
        return replace(settings, subjects=())
    if command == "all" and name == "needle" and settings.data is not None:
        # Its prose comes with nybble; what else lies in the folder is none.
        own = settings.data / "needle"
        return replace(settings, data=own if own.is_dir() else None)
    return settings


def _answerer(model: str, how: How, running: Running) -> tuple[Answerer, dict[str, str]]:
    """Who answers, and what is known of its weights: Int4, Int8 or 16-bit, and which ones."""
    from nybble.checkpoint import Checkpoint
    from nybble.eval.answerers import Endpoint, LocalModel

    if how.endpoint:
        return Endpoint(how.endpoint, model, how.decoding(), workers=how.batch), {"weights": ""}
    from nybble.cli.loading import load

    llm = load(model, running, quiet=False)
    quant = llm.config.quant
    return LocalModel(llm, how.decoding()), {
        "weights": f"Int{quant.bits}" if quant else "16-bit",
        "checkpoint": Checkpoint.open(llm.folder).fingerprint(),
    }


def _about(model: str, what: What, how: How, running: Running) -> dict[str, Any]:
    """What must be equal for a run to be continued. Threads change nothing but the time."""
    from nybble import __version__

    return {
        "model": model,
        "protocol": what.protocol,
        "base": what.base,
        "shots": what.shots,
        "split": what.split,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "seed": how.seed,
        "max_tokens": how.max_tokens,
        "endpoint": how.endpoint and how.endpoint.rstrip("/"),
        **{name: value for name, value in vars(running).items() if name != "threads"},
        "device": running.device.partition(":")[0],  # cuda:1 is as good as cuda:0
        "version": __version__,
    }


def _default_folder(model: str, what: What) -> Path:
    folder = local_folder(model)
    name = Path(model).name if folder is None else folder.resolve().name
    parts = [name or "model", what.protocol, *(["base"] if what.base else [])]
    parts += [f"{what.shots}shot", *([what.split] if what.split else [])]
    return Path("eval-runs") / "-".join(parts)


def show(summaries: dict[str, Summary], as_json: bool, single: bool) -> None:
    if as_json:
        plain = {name: asdict(summary) for name, summary in summaries.items()}
        (only,) = plain.values() if single else (plain,)
        console.write(json.dumps(only, ensure_ascii=False) + "\n")
        return
    for name, summary in summaries.items():
        found = summary.interval
        console.write(
            f"{name}: {summary.score:.2f} (95 % {found.low:.1f} to {found.high:.1f}, "
            f"{found.method}, n = {summary.n})\n"
        )
        if len(summary.parts) <= _FEW:  # those of an exam are dozens of subjects
            for part, value in summary.parts.items():
                console.write(f"  {part}: {value:.2f}\n")
