"""Tool use by ReAct prompts: does the model call the right tool, with the right input, or at all?

Data: the files of the first Qwen repository's evaluation (exam_plugin_v20231206_react_positive
.jsonl and ..._negative.jsonl), rows {"prompt", "response"}; they are not public any more, and any
rows of that form will do. The prompt is complete: tools, instructions and question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nybble.eval import data
from nybble.eval.task import Item, Prompt, Row, Summary, Task, percent
from nybble.tools.react import ACTION, OBSERVATION

_HINT = (
    "a folder with react_positive.jsonl and react_negative.jsonl (or the names that end so), rows "
    '{"prompt": ..., "response": the right Thought/Action/Action Input}.'
)
_CALL = f"{ACTION} "


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments as JSON with sorted keys; "" where they are no JSON."""

    action: str
    arguments: str


class ToolUse(Task):
    """Subjects: "positive" (a tool is needed) and "negative" (none is)."""

    packages = ("json5",)

    def load(self) -> list[Item]:
        return [*self._set("positive"), *self._set("negative")]

    def _set(self, kind: str) -> list[Item]:
        source = data.Source("tools", _HINT)
        names = (f"react_{kind}.jsonl", f"exam_plugin_v20231206_react_{kind}.jsonl")
        path = data.find(source, self.settings.data, *names)
        needed = {"prompt": str, "response": str} if kind == "positive" else {"prompt": str}
        return [
            Item(f"{kind}/{index}", row["prompt"], row.get("response") or "", kind)
            for index, row in enumerate(data.read_jsonl(path, needed))
        ]

    def prompt(self, item: Item) -> Prompt:
        """`card` set no stop word, so a model went on and made up what the tool observed."""
        stop = () if self.settings.card else (OBSERVATION,)
        return Prompt(item.query, chat=not self.settings.base, stop=stop)

    def extract(self, item: Item, output: str) -> str | None:
        return parse_call(output).action if _CALL in output else None

    def score(self, item: Item, answer: str | None) -> float:
        """1 for the right tool, or for none where none is needed."""
        if not _needs_tool(item.subject, item.reference):
            return float(answer is None)
        if answer is None:
            return 0.0
        return float(answer.lower() == parse_call(item.reference).action.lower())

    def aggregate(self, rows: Sequence[Row]) -> Summary:
        """The score is the selection accuracy over the positive set, where there is one."""
        positive = [row for row in rows if _needs_tool(row.subject, row.gt)]
        negative = [row for row in rows if not _needs_tool(row.subject, row.gt)]
        whole = super().aggregate(positive or rows)
        parts: dict[str, float] = {}
        if positive:
            parts["Tool selection"] = whole.score
            parts["Tool input (ROUGE-L)"] = percent([self._input_score(row) for row in positive])
        if negative:
            parts["False positives"] = percent([1 - row.score for row in negative])
        return Summary(whole.score, len(rows), whole.interval, parts)

    def _input_score(self, row: Row) -> float:
        got, wanted = parse_call(row.prediction), parse_call(row.gt)
        tokens = self.settings.tokens
        # Tokens are joined and split again, so that those of white space alone do not count.
        pair = (" ".join(tokens(call.arguments)).split() for call in (got, wanted))
        return rouge_l(*pair)


def _needs_tool(subject: str, reference: str) -> bool:
    return subject == "positive" if subject else "Action:" in reference


def parse_call(text: str) -> Call:
    """The first Action and its input."""
    import json5

    action = re.search(r"Action:(.*?)(?:Action Input:|\Z)", text, re.DOTALL)
    given = re.search(r"Action Input:(.*?)(?:Observation:|\Z)", text, re.DOTALL)
    name = action.group(1).strip() if action else ""
    try:
        value = json5.loads(given.group(1).strip() if given else "")
    except (ValueError, RecursionError):
        return Call(name, "")
    return Call(name, json.dumps(value, ensure_ascii=False, sort_keys=True))


def rouge_l(tokens: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence (Lin 2004)."""
    common = _common_subsequence(tokens, reference)
    if not common:
        return 0.0
    precision, recall = common / len(tokens), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for column, right in enumerate(b, 1):
            above = row[column]
            row[column] = diagonal + 1 if left == right else max(above, row[column - 1])
            diagonal = above
    return row[-1]
