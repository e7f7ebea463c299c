"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches

from nybble.errors import ConfigError
from nybble.eval.task import Settings, Task
from nybble.eval.tasks import leval
from nybble.eval.tasks.ceval import CEval
from nybble.eval.tasks.gsm8k import GSM8K
from nybble.eval.tasks.humaneval import HumanEval
from nybble.eval.tasks.leval import LEval
from nybble.eval.tasks.mmlu import MMLU
from nybble.eval.tasks.needle import Needle
from nybble.eval.tasks.tools import ToolUse

_LEVAL = tuple(f"leval-{kind}" for kind in leval.TASKS)
_MAKERS: Mapping[str, Callable[[str, Settings], Task]] = {
    "ceval": CEval,
    "mmlu": MMLU,
    "humaneval": HumanEval,
    "gsm8k": GSM8K,
    **dict.fromkeys(_LEVAL, LEval),
    "needle": Needle,
    "tools": ToolUse,
}
NAMES = tuple(_MAKERS)
GROUPS: Mapping[str, tuple[str, ...]] = {"all": NAMES, "leval": _LEVAL}
# As the card, the files and people write them.
_ALIASES = {
    "leval-gsm": "leval-gsm100",
    "leval-toefl": "leval-tpo",
    "leval-scifi": "leval-sci_fi",
    "leval-sci-fi": "leval-sci_fi",
    "leval-sfiction": "leval-sci_fi",
    "leval-sfcition": "leval-sci_fi",
    "leval-codeu": "leval-codeU",
    "c-eval": "ceval",
    "tool-use": "tools",
}


def expand(name: str) -> tuple[str, ...]:
    """The benchmarks that a name stands for: itself, or the members of "all" and "leval"."""
    key = name.lower()
    found = _ALIASES.get(key, key)
    if found in GROUPS:
        return GROUPS[found]
    if found in _MAKERS:
        return (found,)
    known = [*GROUPS, *NAMES]
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}."
    raise ConfigError(f"There is no benchmark {name!r}: {hint}")


def make_task(name: str, settings: Settings) -> Task:
    """One benchmark. A data folder may hold one folder for each: mmlu, ceval, leval, ..."""
    (name,) = expand(name)
    if settings.data is not None:
        own = settings.data.expanduser() / name.split("-")[0]
        if own.is_dir():
            settings = replace(settings, data=own)
    return _MAKERS[name](name, settings)
