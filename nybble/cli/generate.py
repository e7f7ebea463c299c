"""`nybble generate`: continue a text, or token ids, as they are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nybble.cli import console, reading
from nybble.cli.loading import load
from nybble.cli.options import Running, Sampling
from nybble.cli.speed import speed_line, timing_json
from nybble.errors import RequestError

if TYPE_CHECKING:
    from nybble.outputs import Completion


@dataclass(frozen=True)
class Output:
    """What is printed, and in which form."""

    ids: bool = False
    as_json: bool = False
    quiet: bool = False


def run(model: str, prompt: str, sampling: Sampling, running: Running, output: Output) -> None:
    text = reading.prompt_text(prompt)
    given = _token_ids(text) if output.ids else text
    llm = load(model, running, output.quiet)
    stream = llm.stream(llm.encode(given), sampling_params=sampling.params(llm.default_params))
    for piece in stream:
        if not output.ids and not output.as_json:
            console.write(piece)
    completion = stream.completion
    console.write(_ending(completion, output) + "\n")
    if not output.quiet:
        console.note(speed_line(completion.timing))


def _ending(completion: Completion, output: Output) -> str:
    """What is printed once the end is known; a text was streamed already."""
    if output.as_json:
        return json.dumps(_as_json(completion), ensure_ascii=False)
    return " ".join(map(str, completion.token_ids)) if output.ids else ""


def _token_ids(text: str) -> list[int]:
    words = re.split(r"[\s,]+", text.strip("[] \t\n"))
    if not all(word.isascii() and word.isdigit() for word in words):
        raise RequestError("--ids takes token ids: whole numbers with spaces or commas between.")
    return [int(word) for word in words]


def _as_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.decoded,
        "token_ids": completion.token_ids,
        "prompt_token_ids": completion.prompt_token_ids,
        "finish_reason": completion.finish_reason,
        "timing": timing_json(completion.timing),
    }
