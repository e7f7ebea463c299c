"""What a load test asks for: chats and the longest answer to each.

A prompt is made of common English words, of which every vocabulary has most as one token. So a
length in tokens is nearly right with any model, and what is reported is what the server counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from nybble.errors import ConfigError

Messages = list[dict[str, Any]]

# Means of ShareGPT's first turns as Kwon et al. 2023 (vLLM, figure 11) give them. That lengths
# are log-normal, and how widely they spread, are this file's own choices; limits as usual.
_MEAN_PROMPT, _MEAN_ANSWER, _SPREAD = 161, 338, 1.0
_LIMITS = (4, 1024)
_CHARACTERS_A_TOKEN = 4

_WORDS = (
    "the of and to in is that for it was on are with as they at be this have from or had by but "
    "some what there we can out other were all your when up use word how said an each she which "
    "do their time if will way about many then them would write like so these her long make thing "
    "see him two has look more day could go come did my sound no most number who over know water "
    "than call first people may down side been now find any new work part take get place made "
    "live where after back little only round man year came show every good me give our under name"
)


@dataclass(frozen=True)
class Job:
    """One request: a chat, and the most tokens of its answer."""

    messages: Messages
    max_tokens: int


def fixed(prompt_tokens: int, output_tokens: int, random: Random) -> Iterator[Job]:
    """Without end: prompts of one length, all different from their first words on."""
    while True:
        yield Job(_chat(_text(prompt_tokens, random)), output_tokens)


def sharegpt_like(random: Random) -> Iterator[Job]:
    """Without end: lengths as people's chats have them, prompt and answer independent."""
    while True:
        prompt = _text(_length(_MEAN_PROMPT, random), random)
        yield Job(_chat(prompt), _length(_MEAN_ANSWER, random))


def read_jobs(path: Path, random: Random) -> list[Job]:
    """The rows of a file: JSON Lines, or a JSON list as ShareGPT's.

    A row is {"prompt": text} or {"messages": [...]} or {"prompt_tokens": number}, each with
    "output_tokens"; or ShareGPT's {"conversations": [{"value": ...}, {"value": ...}]}, whose
    answer is taken as a token for every four characters; of those, what does not begin with a
    person and an answer is left out, as is usual. ConfigError names a bad row.
    """
    try:
        rows = _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give JSON Lines.") from error
    if not rows:
        raise ConfigError(f"{path} has no rows: write one JSON object a line.")
    found = (_job(row, f"{path}, row {number}", random) for number, row in enumerate(rows, 1))
    if jobs := [job for job in found if job is not None]:
        return jobs
    raise ConfigError(f"{path} has no chat that begins with a question and an answer: {_FORMS}.")


def take(jobs: Iterator[Job] | list[Job], count: int) -> list[Job]:
    """The first `count`; a list is begun again where it is shorter."""
    return list(islice(cycle(jobs) if isinstance(jobs, list) else jobs, count))


def _parse(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _job(row: object, where: str, random: Random) -> Job | None:
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is no JSON object: {_FORMS}.")
    if "conversations" in row:
        return _shared_chat(row, where)
    tokens = _positive(row, "output_tokens", where)
    if isinstance(row.get("messages"), list):
        return Job(row["messages"], tokens)
    if isinstance(row.get("prompt"), str):
        return Job(_chat(row["prompt"]), tokens)
    return Job(_chat(_text(_positive(row, "prompt_tokens", where), random)), tokens)


_FORMS = 'write {"prompt": "Hi", "output_tokens": 64} or {"prompt_tokens": 128, ...}'


def _shared_chat(row: dict[str, Any], where: str) -> Job | None:
    """None where fewer than two turns are left of a chat, or an answer comes first."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConfigError(f"{where}: conversations is no list of turns; leave it out of the file.")
    prompt, answer = ([turn.get("value") for turn in turns] + [None] * 2)[:2]
    if not isinstance(prompt, str) or not isinstance(answer, str) or turns[0].get("from") == "gpt":
        return None
    return Job(_chat(prompt), max(len(answer) // _CHARACTERS_A_TOKEN, 1))


def _positive(row: dict[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if isinstance(value, int) and value > 0:
        return value
    raise ConfigError(f"{where}: {name} is {value!r}; {_FORMS}.")


def _length(mean: float, random: Random) -> int:
    middle = math.log(mean) - _SPREAD**2 / 2
    low, high = _LIMITS
    return min(max(round(random.lognormvariate(middle, _SPREAD)), low), high)


def _text(tokens: int, random: Random) -> str:
    return " ".join(random.choices(_WORDS.split(), k=tokens))


def _chat(text: str) -> Messages:
    return [{"role": "user", "content": text}]
