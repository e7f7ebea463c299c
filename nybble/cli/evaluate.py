"""`nybble eval`: run the card's benchmarks, score files of answers, and report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.cli import benchmarks
from nybble.cli.extras import require
from nybble.cli.folders import expanded
from nybble.cli.options import AsJson, Running, expand_options
from nybble.errors import ConfigError

if TYPE_CHECKING:
    from nybble.eval.answerers import Answerer, Decoding
    from nybble.eval.task import Settings

commands = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

# Name and help of each command that runs benchmarks.
_RUNS = {
    "all": "Run every benchmark whose data is found or can be downloaded.",
    "ceval": "C-Eval: 52 subjects in Chinese.",
    "mmlu": "MMLU: 57 subjects in English.",
    "humaneval": "HumanEval: 164 Python functions; their tests run in a sandbox.",
    "gsm8k": "GSM8K: 1,319 word problems.",
    "leval": "L-Eval, closed-ended: questions about long documents.",
    "needle": "A needle in a haystack: lengths times depths.",
    "tools": "Tool use by ReAct prompts.",
}
_PROTOCOLS = ("card", "modern")


def _option(help_text: str, *names: str, default: bool | str = False) -> Any:
    return typer.Option(*names, help=help_text, show_default=default)


@dataclass(frozen=True)
class What:
    """Which questions are asked, and how."""

    data: Annotated[Path | None, _option("Folder of the published files; else downloaded.")] = None
    protocol: Annotated[
        str,
        _option(
            "card: as the model card's numbers were made; modern: as is done today.", default=True
        ),
    ] = "card"
    base: Annotated[bool, _option("The model is no chat model.", "--base")] = False
    shots: Annotated[int, _option("Worked examples before each question.")] = 0
    samples: Annotated[int, _option("Answers to each question, for pass@k.", default=True)] = 1
    split: Annotated[str, _option("Another part of the data: val or test.")] = ""
    subjects: Annotated[str, _option("Subjects or categories, with commas.")] = ""
    limit: Annotated[int | None, _option("At most so many questions a benchmark.")] = None
    lengths: Annotated[
        str,
        _option(
            "Of the haystack, in tokens, with commas.", default="1000 to 32000, as far as fits"
        ),
    ] = ""
    depths: Annotated[
        str, _option("Of the needle, in per cent, with commas.", default="0 to 100, ten")
    ] = ""
    run_code_unsafely: Annotated[
        bool, _option("Run a model's code even where it cannot be isolated.", "--run-code-unsafely")
    ] = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.subjects.split(",") if name.strip())

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
            data=self.data and expanded("--data", self.data),
            split=self.split,
            subjects=self.names,
            lengths=_numbers("--lengths", self.lengths) or _lengths_below(context),
            depths=_numbers("--depths", self.depths) or Settings.depths,
            tokens=answerer.tokens if answerer else words,
            context=context,
            unsafe=self.run_code_unsafely,
        )


@dataclass(frozen=True)
class How:
    """Who answers, and where the answers go."""

    out: Annotated[
        Path | None,
        _option(
            "Folder of the run; the same one resumes it.", default="eval-runs/MODEL-PROTOCOL-SHOTS"
        ),
    ] = None
    endpoint: Annotated[str, _option("Ask an OpenAI-compatible server: http://.../v1.")] = ""
    batch: Annotated[int, _option("Questions asked at a time.", default=True)] = 8
    temperature: Annotated[float, _option("0, the default, is greedy.")] = 0.0
    top_p: Annotated[float, _option("Sample from this probability mass.")] = 1.0
    seed: Annotated[int, _option("Of the samples.")] = 0
    max_tokens: Annotated[int | None, _option("The longest answer, in tokens.")] = None

    def decoding(self) -> Decoding:
        from nybble.eval.answerers import Decoding

        return Decoding(self.temperature, self.top_p, self.max_tokens)


_Model = Annotated[
    str, typer.Argument(help="A model as in `nybble chat`, or its name at the endpoint.")
]


def _register(name: str, help_text: str) -> None:
    """One command for each benchmark, all with the same options."""

    @expand_options
    def run(
        model: _Model = "demo",
        as_json: AsJson = False,
        *,
        what: What,
        how: How,
        running: Running,
    ) -> None:
        benchmarks.run(name, model, what, how, running, as_json)

    commands.command(name, help=help_text)(run)


for _name, _help in _RUNS.items():
    _register(_name, _help)


@commands.command(short_help="Score answers of another system, or an earlier run.")
@expand_options
def score(
    task: Annotated[str, typer.Argument(help="gsm8k, mmlu, leval-coursera, ...")],
    predictions: Annotated[
        Path, typer.Option(help='JSONL with rows {"query", "gt", "prediction"}.')
    ],
    protocol: Annotated[str, typer.Option(help="card or modern.")] = "card",
    base: Annotated[bool, typer.Option("--base", help="Answers of a base model.")] = False,
    as_json: AsJson = False,
    run_code_unsafely: Annotated[
        bool, typer.Option("--run-code-unsafely", help="Run code where it cannot be isolated.")
    ] = False,
) -> None:
    """Score answers that another system, or an earlier run, has given."""
    from nybble.eval.data import read_jsonl
    from nybble.eval.runner import score_rows
    from nybble.eval.task import OF_A_ROW
    from nybble.eval.tasks import expand, make_task

    what = What(protocol=protocol, base=base, run_code_unsafely=run_code_unsafely)
    rows = read_jsonl(predictions, {"query": str, "gt": str, "prediction": str}, OF_A_ROW)
    if len(names := expand(task)) > 1:
        raise ConfigError(f"{task} is several benchmarks, score takes one: {', '.join(names)}.")
    made = make_task(task, what.settings())
    require(made.name, "eval", *made.packages)
    summary, _ = score_rows(made, rows)
    benchmarks.show({task: summary}, as_json, single=True)


@commands.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Where report.md and report.html go.")] = Path(
        "eval-report"
    ),
) -> None:
    """Set runs beside the card's figures: tables, radar, needle map."""
    require("A report", "eval", "matplotlib")
    from nybble.eval.report import load_run, write

    for path in write([load_run(folder) for folder in runs], out):
        typer.echo(path)


def _lengths_below(context: int | None) -> tuple[int, ...]:
    """The needle's usual lengths, as far as the model goes."""
    from nybble.eval.task import Settings

    usual = Settings.lengths
    fitting = tuple(length for length in usual if context is None or length + 200 <= context)
    return fitting or (usual[0],)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    words = [word for word in text.split(",") if word.strip()]
    if not all(word.strip().isdecimal() for word in words):
        raise ConfigError(f"{option} is {text!r}: give whole numbers with commas between.")
    return tuple(int(word) for word in words)
