"""The commands and their options. What they do is imported when one of them runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import console
from nybble.cli.batch import Files
from nybble.cli.bench import commands as bench
from nybble.cli.errors import CommandGroup, report_bug
from nybble.cli.evaluate import commands as evaluate
from nybble.cli.options import (
    SAMPLING_DEFAULTS,
    AsJson,
    Measured,
    Model,
    Running,
    Sampling,
    expand_options,
)
from nybble.cli.quantize import Calibration, Format, Work
from nybble.cli.serve import Batching, Listening

Text = Annotated[Path, typer.Option(help="A UTF-8 text that the model has not been fitted to.")]
Window = Annotated[int, typer.Option(help="Tokens that are predicted from one another.")]

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command `nybble`."""
    sys.excepthook = report_bug
    console.open_closed_streams()
    console.use_utf8()
    typer.main.get_command(app)(prog_name="nybble")


def _print_version(wanted: bool) -> None:
    if wanted:
        from nybble import __version__

        typer.echo(f"nybble {__version__}")
        raise typer.Exit


@app.callback()
def nybble(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Run Qwen chat models in four bits, at the speed of the machine's memory."""
    if debug:
        sys.excepthook = sys.__excepthook__


@app.command(epilog=SAMPLING_DEFAULTS, short_help="Chat with a model: one answer, or a session.")
@expand_options
def chat(
    model: Model = "demo",
    prompt: Annotated[
        str | None, typer.Argument(help="Answer this and exit; - reads it from stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print answers and errors only.")
    ] = False,
    *,
    sampling: Sampling,
    running: Running,
) -> None:
    """Chat with a model: one answer, or a session that /help explains."""
    from nybble.cli.chat import run

    run(model, prompt, system, sampling, running, quiet)


@app.command(epilog=SAMPLING_DEFAULTS, short_help="Continue a text, or answer a file of prompts.")
@expand_options
def generate(
    model: Model = "demo",
    prompt: Annotated[
        str, typer.Argument(help="The text to continue; - reads it from stdin.")
    ] = "-",
    ids: Annotated[
        bool, typer.Option("--ids", help="Take and print token ids instead of text.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when it is finished.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the text and errors only.")
    ] = False,
    *,
    files: Files,
    sampling: Sampling,
    running: Running,
) -> None:
    """Continue a text as it is, without any chat format; or answer a file of prompts."""
    from nybble.cli import batch, generate

    if files.given:
        source, target = files.checked(alone=prompt == "-" and not ids and not as_json)
        batch.run(model, source, target, sampling, running, quiet)
    else:
        output = generate.Output(ids, as_json, quiet)
        generate.run(model, prompt, sampling, running, output)


@app.command()
@expand_options
def serve(
    model: Model = "demo",
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the chat page in a browser.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No line for each request.")] = False,
    *,
    listening: Listening,
    running: Batching,
) -> None:
    """Serve a model: OpenAI's API under /v1, and a chat page at /."""
    from nybble.cli.serve import run

    run(model, running, listening, open_page, quiet)


@app.command()
def pull(
    model: Model,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of a hub repository.")
    ] = None,
    source: Annotated[str, typer.Option(help="huggingface or modelscope.")] = "huggingface",
) -> None:
    """Download a model, and print the folder it stands in."""
    from nybble.cli.loading import pull_folder

    typer.echo(pull_folder(model, revision, source))


@app.command()
def info(
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Tell what a model is, and whether it fits here."""
    from nybble.cli.info import run

    run(model, as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Tell what runs here and what is missing."""
    from nybble.cli.doctor import run

    run(as_json)


@app.command()
@expand_options
def quantize(
    source: Model,
    target: Annotated[Path, typer.Argument(help="The folder to write; new, or empty.")],
    as_json: AsJson = False,
    *,
    form: Format,
    calibration: Calibration,
    work: Work,
) -> None:
    """Turn a 16-bit model into a GPTQ checkpoint. Run again after a crash, it goes on."""
    from nybble.cli.quantize import run

    run(source, target, form, calibration, work, as_json)


@app.command(short_help="Measure how well a model predicts a text.")
@expand_options
def perplexity(
    model: Model, text: Text, window: Window = 1024, as_json: AsJson = False, *, running: Measured
) -> None:
    """Measure how well a model predicts a text, in windows that do not overlap."""
    from nybble.cli.measuring import perplexity

    perplexity(model, text, window, running, as_json)


@app.command(short_help="Measure what quantising cost.")
@expand_options
def compare(
    base: Model,
    quant: Model,
    text: Text,
    window: Window = 1024,
    plot: Annotated[Path | None, typer.Option(help="Draw each layer's error as PNG.")] = None,
    as_json: AsJson = False,
    *,
    running: Measured,
) -> None:
    """Measure what quantising cost: perplexity, divergence, agreement and size."""
    from nybble.cli.measuring import compare

    compare(base, quant, text, window, running, plot, as_json)


app.add_typer(bench, name="bench", help="Measure how fast this machine is.")
app.add_typer(evaluate, name="eval", help="Measure a model on the card's benchmarks.")
