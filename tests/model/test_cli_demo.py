"""The command line on the demo, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys


def nybble(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nybble", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_demo_knows_the_capital_of_france() -> None:
    done = nybble("chat", "demo", "What is the capital of France?", "--temperature", "0")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stderr.startswith("demo (llama, 4-bit), kernels ")


def test_a_chat_through_a_pipe_remembers_what_was_said() -> None:
    # Long enough to fill a page of the cache, which the second prompt then finds.
    question = (
        "I am planning a long journey through Europe by train, and before I leave I would like to "
        "know a few facts about the countries on my way. What is the capital of France?"
    )
    messages = f"{question}\nAnd of Italy?\n/history\n"
    done = nybble("chat", "--temperature", "0", "--max-tokens", "40", stdin=messages)
    assert done.returncode == 0
    assert "Paris" in done.stdout.splitlines()[0]
    assert "cached" in done.stderr
    assert "user: And of Italy?" in done.stderr


def test_generate_continues_a_text() -> None:
    options = ("--temperature", "0", "--max-tokens", "4", "--json")
    done = nybble("generate", "demo", *options, stdin="The capital of France is\n")
    answer = json.loads(done.stdout)
    assert answer["text"].startswith(" Paris")
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == 4


def test_info_of_the_demo() -> None:
    facts = json.loads(nybble("info", "demo", "--json").stdout)
    assert facts["parameters"] == 134_515_008  # as Hugging Face counts SmolLM2-135M
    assert facts["quantisation"]["group_size"] == 32
    assert facts["tokenizer"] is True
