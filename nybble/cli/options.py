"""Options that several commands share, as dataclasses that a command takes whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from nybble.paths import local_folder

if TYPE_CHECKING:
    from nybble.sampling import SamplingParams

SAMPLING_DEFAULTS = "Sampling options left out are as the model's authors recommend."


def _option(help_text: str) -> Any:
    return typer.Option(help=help_text, show_default=False)


def _checked_model(name: str) -> str:
    if any(character.isspace() for character in name) and local_folder(name) is None:
        raise typer.BadParameter(f"{name!r} looks like a prompt; the model comes first: demo, say.")
    return name


Model = Annotated[
    str,
    typer.Argument(
        callback=_checked_model,
        help="A folder, demo (a small model that comes with nybble), or a hub repository id.",
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class Sampling:
    """Settings of SamplingParams; None leaves the model's default."""

    temperature: Annotated[float | None, _option("0 always takes the likeliest token.")] = None
    top_p: Annotated[float | None, _option("Sample from this probability mass.")] = None
    top_k: Annotated[int | None, _option("Sample from so many tokens; 0: all.")] = None
    min_p: Annotated[
        float | None, _option("Leave out what is less likely than this share of the top.")
    ] = None
    repetition_penalty: Annotated[
        float | None, _option("Above 1: against tokens of prompt and answer.")
    ] = None
    presence_penalty: Annotated[float | None, _option("-2 to 2: against tokens of the answer.")] = (
        None
    )
    frequency_penalty: Annotated[float | None, _option("-2 to 2: the same, per occurrence.")] = None
    seed: Annotated[int | None, _option("The same seed gives the same text.")] = None
    max_tokens: Annotated[int | None, _option("The longest answer, in tokens.")] = None
    stop: Annotated[list[str] | None, _option("End before this text; may be repeated.")] = None

    def __post_init__(self) -> None:
        """Refuse what is out of range before a model is loaded."""
        from nybble.sampling import SamplingParams

        self.params(SamplingParams())

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """The model's defaults with what was given on the command line in their place."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(defaults, **{k: v for k, v in given.items() if v not in (None, [])})


@dataclass(frozen=True)
class Running:
    """Settings of LLM."""

    device: Annotated[str, _option("auto, cpu, cuda or cuda:1.")] = "auto"
    dtype: Annotated[str, _option("auto: the fastest kernels; float32: exact and slow.")] = "auto"
    kv_dtype: Annotated[
        str, _option("Of the KV cache: auto, float16, bfloat16, float32, int8, int6, int4.")
    ] = "auto"
    max_context: Annotated[int | None, _option("Tokens of prompt and answer together.")] = None
    threads: Annotated[int | None, _option("CPU threads; else as many as are free.")] = None


@dataclass(frozen=True)
class Measured(Running):
    """The same for commands that measure: the checkpoint itself, unless kernels are asked for."""

    dtype: Annotated[
        str, _option("float32: the model, exactly; auto: what the fastest kernels make of it.")
    ] = "float32"


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give each field of a command's dataclass parameters an option of its own.

    typer reads a command's signature, and knows no groups of options.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += _field_parameters(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _field_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
