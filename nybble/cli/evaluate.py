"""`nybble eval`: run the card's benchmarks, score files of answers, and report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import console
from nybble.cli.options import Running, expand_options
from nybble.errors import ConfigError

if TYPE_CHECKING:
    from nybble.eval.answerers import Answerer
    from nybble.eval.task import Settings, Summary

commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

# Name and help of each command that runs benchmarks.
_RUNS = {
    "all": "Run every benchmark whose data is at hand.",
    "ceval": "C-Eval: 52 subjects in Chinese.",
    "mmlu": "MMLU: 57 subjects in English.",
    "humaneval": "HumanEval: 164 Python functions; their tests run in a sandbox.",
    "gsm8k": "GSM8K: 1,319 word problems.",
    "leval": "L-Eval, closed-ended: questions about long documents.",
    "needle": "A needle in a haystack: lengths times depths.",
    "tools": "Tool use by ReAct prompts.",
}
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_PROTOCOLS = ("card", "modern")


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, show_default=False)


@dataclass(frozen=True)
class What:
    """Which questions are asked, and how."""

    data: Annotated[Path | None, _option("Folder of the published files; else downloaded.")] = None
    protocol: Annotated[
        str, _option("card: as the model card's numbers were made; modern: as is done today.")
    ] = "card"
    base: Annotated[bool, _option("The model is no chat model.", "--base")] = False
    shots: Annotated[int, _option("Worked examples before each question.")] = 0
    samples: Annotated[int, _option("Answers to each question, for pass@k.")] = 1
    split: Annotated[str, _option("Another part of the data: val or test.")] = ""
    subjects: Annotated[str, _option("Subjects or categories, with commas.")] = ""
    limit: Annotated[int | None, _option("At most so many questions a benchmark.")] = None
    lengths: Annotated[str, _option("Of the haystack, in tokens, with commas.")] = ""
    depths: Annotated[str, _option("Of the needle, in per cent, with commas.")] = ""
    run_code_unsafely: Annotated[
        bool, _option("Run a model's code even where it cannot be isolated.", "--run-code-unsafely")
    ] = False

    def settings(self, answerer: Answerer | None = None) -> Settings:
        from nybble.eval.task import Settings
        from nybble.eval.text import words

        if self.protocol not in _PROTOCOLS:
            raise ConfigError(f"--protocol is {self.protocol!r}: use {' or '.join(_PROTOCOLS)}.")
        if self.samples < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError("--samples and --limit must be at least 1.")
        context = answerer.context if answerer else None
        return Settings(
            protocol="modern" if self.protocol == "modern" else "card",
            base=self.base,
            shots=self.shots,
            samples=self.samples,
            data=self.data,
            split=self.split,
            subjects=tuple(name for name in self.subjects.split(",") if name),
            lengths=_numbers("--lengths", self.lengths) or _lengths_below(context),
            depths=_numbers("--depths", self.depths) or Settings.depths,
            tokens=answerer.tokens if answerer else words,
            context=context,
            unsafe=self.run_code_unsafely,
        )


@dataclass(frozen=True)
class How:
    """Who answers, and where the answers go."""

    out: Annotated[Path | None, _option("Folder of the run; the same one resumes it.")] = None
    endpoint: Annotated[str, _option("Ask an OpenAI-compatible server: http://.../v1.")] = ""
    batch: Annotated[int, _option("Questions asked at a time.")] = 8
    temperature: Annotated[float, _option("0, the default, is greedy.")] = 0.0
    top_p: Annotated[float, _option("Sample from this probability mass.")] = 1.0
    seed: Annotated[int, _option("Of the samples.")] = 0
    max_tokens: Annotated[int | None, _option("The longest answer, in tokens.")] = None


_Model = Annotated[
    str, typer.Argument(help="A model as in `nybble chat`, or its name at the endpoint.")
]


def _register(name: str, help_text: str) -> None:
    """One command for each benchmark, all with the same options."""

    @expand_options
    def run(
        model: _Model = "demo",
        as_json: _Json = False,
        *,
        what: What,
        how: How,
        running: Running,
    ) -> None:
        _run(name, model, what, how, running, as_json)

    commands.command(name, help=help_text)(run)


for _name, _help in _RUNS.items():
    _register(_name, _help)


@commands.command()
@expand_options
def score(
    task: Annotated[str, typer.Argument(help="gsm8k, mmlu, leval-coursera, ...")],
    predictions: Annotated[
        Path, typer.Option(help='JSONL with rows {"query", "gt", "prediction"}.')
    ],
    protocol: Annotated[str, typer.Option(help="card or modern.")] = "card",
    base: Annotated[bool, typer.Option("--base", help="Answers of a base model.")] = False,
    as_json: _Json = False,
    run_code_unsafely: Annotated[
        bool, typer.Option("--run-code-unsafely", help="Run code where it cannot be isolated.")
    ] = False,
) -> None:
    """Score answers that another system, or an earlier run, has given."""
    from nybble.eval.data import read_jsonl
    from nybble.eval.runner import score_rows
    from nybble.eval.tasks import make_task

    what = What(protocol=protocol, base=base, run_code_unsafely=run_code_unsafely)
    needed = {"query": str, "gt": str, "prediction": str}
    rows = read_jsonl(predictions, needed)
    summary, _ = score_rows(make_task(task, what.settings()), rows)
    _print({task: summary}, as_json, single=True)


@commands.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Where report.md and report.html go.")] = Path(
        "eval-report"
    ),
) -> None:
    """Set runs beside the card's figures: tables, radar, needle map."""
    from nybble.eval.report import load_run, write

    for path in write([load_run(folder) for folder in runs], out):
        typer.echo(path)


# -- running ---------------------------------------------------------------------------------------


def _run(name: str, model: str, what: What, how: How, running: Running, as_json: bool) -> None:
    from nybble.eval.data import DataError
    from nybble.eval.runner import RunFolder, run_task
    from nybble.eval.tasks import make_task

    what.settings()  # refuses bad options before a model is loaded
    names = _selected(name, what)
    if what.samples > 1 and not how.temperature:
        raise ConfigError("--samples above 1 needs --temperature: greedy answers are all alike.")
    if (what.lengths or what.depths) and name not in ("needle", "all"):
        raise ConfigError("--lengths and --depths go with the needle only: leave them out.")
    answerer, weights = _answerer(model, how, running)
    settings = what.settings(answerer)
    if name == "leval":  # its subjects were benchmarks of their own
        settings = replace(settings, subjects=())
    folder = RunFolder(how.out or _default_folder(model, what), _about(model, weights, what, how, running))
    summaries: dict[str, Summary] = {}
    for task_name in names:
        try:
            with console.ProgressBar() as progress:
                summaries[task_name] = run_task(
                    make_task(task_name, settings),
                    answerer,
                    folder,
                    limit=what.limit,
                    batch=how.batch,
                    seed=how.seed,
                    progress=progress,
                )
        except DataError as error:
            if name != "all":
                raise
            console.note(f"{task_name} is left out. {error}")
    if not summaries:
        raise ConfigError("No benchmark has its data: give --data DIR.")
    _print(summaries, as_json, single=False)
    console.note(f"Answers and results: {folder.path}. Next: nybble eval report {folder.path}")


def _selected(name: str, what: What) -> tuple[str, ...]:
    """The benchmarks of a command; the subjects of L-Eval are benchmarks themselves."""
    from nybble.eval.tasks import expand

    if name != "leval" or not what.subjects:
        return expand(name)
    return tuple(task for kind in what.subjects.split(",") for task in expand(f"leval-{kind}"))


def _lengths_below(context: int | None) -> tuple[int, ...]:
    """The needle's usual lengths, as far as the model goes."""
    from nybble.eval.task import Settings

    usual = Settings.lengths
    fitting = tuple(length for length in usual if context is None or length + 200 <= context)
    return fitting or (usual[0],)


def _answerer(model: str, how: How, running: Running) -> tuple[Answerer, str]:
    """Who answers, and what its weights are called: Int4, Int8, 16-bit, or nothing."""
    from nybble.eval.answerers import Decoding, Endpoint, LocalModel

    if how.batch < 1:
        raise ConfigError("--batch must be at least 1.")
    decoding = Decoding(how.temperature, how.top_p, how.max_tokens)
    if how.endpoint:
        if running != Running():
            raise ConfigError("--endpoint goes without --device and the like: its server has them.")
        return Endpoint(how.endpoint, model, decoding, workers=how.batch), ""
    from nybble.cli.loading import load

    llm = load(model, running, quiet=False)
    quant = llm.config.quant
    return LocalModel(llm, decoding), f"Int{quant.bits}" if quant else "16-bit"


def _about(
    model: str, weights: str, what: What, how: How, running: Running
) -> dict[str, Any]:
    """What must be equal for a run to be continued. Threads change nothing but the time."""
    from nybble import __version__

    return {
        "model": model,
        "weights": weights,
        "protocol": what.protocol,
        "base": what.base,
        "shots": what.shots,
        "split": what.split,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "seed": how.seed,
        "max_tokens": how.max_tokens,
        "endpoint": how.endpoint,
        **{name: value for name, value in vars(running).items() if name != "threads"},
        "version": __version__,
    }


def _default_folder(model: str, what: What) -> Path:
    parts = [Path(model).name or "model", what.protocol, *(["base"] if what.base else [])]
    parts += [f"{what.shots}shot", *([what.split] if what.split else [])]
    return Path("eval-runs") / "-".join(parts)


def _print(summaries: dict[str, Summary], as_json: bool, single: bool) -> None:
    from dataclasses import asdict

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


def _numbers(option: str, text: str) -> tuple[int, ...]:
    words = [word for word in text.split(",") if word.strip()]
    if not all(word.strip().isdecimal() for word in words):
        raise ConfigError(f"{option} is {text!r}: give whole numbers with commas between.")
    return tuple(int(word) for word in words)
