"""Commands from their arguments to what they print and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from fake_llm import FakeLLM
from safetensors.torch import load_file
from typer.testing import CliRunner

from nybble.cli import reading
from nybble.cli.app import app
from nybble.paths import local_folder
from nybble.sampling import SamplingParams

TOY = Path(__file__).parents[2] / "data" / "qwen1-plain"


def run(*arguments: str, stdin: bytes | str = "") -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr("nybble.cli.chat.load", lambda *_: fake)
    monkeypatch.setattr("nybble.cli.generate.load", lambda *_: fake)
    return fake


def test_one_answer_is_all_that_stdout_holds(llm: FakeLLM) -> None:
    result = run("chat", "demo", "hello")
    assert (result.exit_code, result.stdout) == (0, "You said hello\n")
    assert "tokens" in result.stderr


def test_quiet_leaves_the_answer_alone(llm: FakeLLM) -> None:
    assert run("chat", "demo", "hello", "--quiet").output == "You said hello\n"


def test_a_chat_reads_its_messages_from_a_pipe(llm: FakeLLM) -> None:
    result = run("chat", stdin="one\ntwo \\\nlines\n")
    assert result.stdout == "You said one\nYou said two \nlines\n"
    assert run("chat", stdin="poison\n").exit_code == 1


def test_the_prompt_may_come_from_stdin(llm: FakeLLM) -> None:
    assert run("chat", "demo", "-", stdin="a\nb\n").stdout == "You said a\nb\n"
    assert run("generate", "demo", stdin="Once\n").stdout == "Once\n"


def test_system_prompt(llm: FakeLLM) -> None:
    run("chat", "demo", "hello", "--system", "Be brief.")
    assert llm.prompts[0][0] == {"role": "system", "content": "Be brief."}


def test_sampling_options_replace_the_models_defaults(llm: FakeLLM) -> None:
    options = (
        "--temperature 0.1 --top-p 0.2 --top-k 3 --min-p 0.4 --repetition-penalty 1.5 "
        "--presence-penalty 0.6 --frequency-penalty 0.7 --seed 8 --max-tokens 9 --stop a --stop b"
    )
    run("chat", "demo", "hello", *options.split())
    assert llm.params[-1] == SamplingParams(
        temperature=0.1,
        top_p=0.2,
        top_k=3,
        min_p=0.4,
        repetition_penalty=1.5,
        presence_penalty=0.6,
        frequency_penalty=0.7,
        seed=8,
        max_tokens=9,
        stop=("a", "b"),
    )
    run("chat", "demo", "hello", "--temperature", "0")
    assert llm.params[-1] == SamplingParams(temperature=0, top_p=0.8)


def test_running_options_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load(*arguments: Any) -> FakeLLM:
        seen.extend(arguments)
        return FakeLLM()

    monkeypatch.setattr("nybble.cli.chat.load", load)
    options = "--device cpu --dtype float32 --kv-dtype float16 --max-context 64 --threads 1"
    run("chat", "some/model", "hello", *options.split())
    model, running, quiet = seen
    assert (model, quiet) == ("some/model", False)
    assert vars(running) == {
        "device": "cpu",
        "dtype": "float32",
        "kv_dtype": "float16",
        "max_context": 64,
        "threads": 1,
    }


def test_generate_prints_one_json_object(llm: FakeLLM) -> None:
    result = run("generate", "demo", "Once", "--max-tokens", "3", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "Onc"
    assert answer["token_ids"] == [79, 110, 99]
    assert answer["prompt_token_ids"] == [79, 110, 99, 101]
    assert answer["finish_reason"] == "length"
    assert answer["timing"]["prefill_tokens_per_second"] == pytest.approx(4 / 0.5)


def test_generate_takes_and_gives_ids(llm: FakeLLM) -> None:
    assert run("generate", "demo", "[72, 105]", "--ids").stdout == "72 105\n"
    result = run("generate", "demo", "72 x", "--ids")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "whole numbers" in result.stderr


def test_an_empty_message_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.cli.chat.load", lambda *_: 1 / 0)
    assert "The message is empty" in run("chat", "demo", "  ").stderr


def test_a_folder_without_tokenizer_answers_in_ids() -> None:
    """The true engine, on the toy: its golden greedy ids."""
    cases = load_file(TOY / "expected.safetensors")
    prompt, wanted = (cases[f"decode0.{name}"].tolist() for name in ("input_ids", "greedy_ids"))
    options = ("--ids", "--temperature", "0", "--max-tokens", str(len(wanted)))
    running = ("--dtype", "float32")
    result = run("generate", str(TOY), " ".join(map(str, prompt)), *options, *running)
    assert result.stdout.split() == [str(token) for token in wanted]
    assert result.stderr.startswith(f"{TOY} (qwen, unquantised), kernels ")
    assert "no tokenizer" in run("chat", str(TOY), "hello").stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["chat", "demo", "hello", "--temperature", "-1"], b"", "temperature is -1.0"),
        (["chat", "demo", "hello", "--top-p", "nan"], b"", "top_p is nan"),
        (["chat", "demo", ""], b"", "The prompt is empty"),
        (["chat", "demo", " "], b"", "The message is empty"),
        (["generate", "demo"], b"", "The prompt is empty"),
        (["generate", "demo"], b"abc\xff", "stdin is not UTF-8 at byte 3"),
        (["chat", "demo", "poison"], b"", "This text is poison"),
    ],
)
def test_bad_requests_are_one_line_on_stderr(
    llm: FakeLLM, arguments: list[str], stdin: bytes, says: str
) -> None:
    result = run(*arguments, stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {says}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "says"),
    [("generate", "stdin is longer than 4 bytes"), ("chat", "A line of stdin is longer than 4 ch")],
)
def test_endless_input_is_refused(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, command: str, says: str
) -> None:
    monkeypatch.setattr(reading, "_LONGEST", 4)
    assert run(command, "demo", stdin="four").exit_code == 0
    result = run(command, "demo", stdin="fives")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {says}")


def test_debug_lets_the_error_through(llm: FakeLLM) -> None:
    result = run("--debug", "chat", "demo", "poison")
    assert "poison" in str(result.exception)


@pytest.mark.parametrize("prompt", ["What is the capital of France?", "Why? " * 1000])
def test_a_prompt_in_the_models_place_is_noticed(prompt: str) -> None:
    result = run("chat", prompt)
    assert result.exit_code == 2
    assert "the model comes first" in result.stderr


@pytest.mark.parametrize("name", ["a word " * 100, "~nosuchuser/a b", "NUL \0"])
def test_what_can_be_no_path_is_no_folder(name: str) -> None:
    result = run("chat", name)
    assert result.exit_code == 2
    assert "the model comes first" in result.stderr
    assert local_folder(name) is None


def test_a_file_that_cannot_be_written_is_no_bug(llm: FakeLLM, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        (tmp_path / "none" / "x").write_text("")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nybble.cli.generate.load", fail)
        result = run("generate", "demo", "Once")
        assert result.exit_code == 1
        assert f"No such file or directory: {tmp_path}/none/x. Check" in result.stderr
        assert isinstance(run("--debug", "generate", "demo", "x").exception, FileNotFoundError)


@pytest.mark.parametrize("arguments", [["chat", "--nonsense"], ["chatt"], ["pull"], ["info"]])
def test_usage_errors_exit_with_two(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("name", ["why?" * 1000, "~nobody-at-all/model"])
def test_what_can_be_no_path_is_an_unknown_model(name: str) -> None:
    for command in ("chat", "pull", "info"):
        result = run(command, name, stdin="hello")
        assert result.exit_code == 1
        assert "is no folder here and no model name" in result.stderr


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "file/cache"))
    result = run("pull", "demo")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path}/file/cache/models: ")


def test_an_unknown_model_says_what_a_model_can_be() -> None:
    for command in ("chat", "generate", "pull", "info"):
        result = run(command, "nosuch", stdin="hello")
        assert result.exit_code == 1
        assert "is no folder here and no model name" in result.stderr


def test_pull_prints_the_folder(tmp_path: Path) -> None:
    toy.write_llama(tmp_path)
    result = run("pull", str(tmp_path))
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}\n")


def test_half_a_download_is_not_taken_for_a_model(tmp_path: Path) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    toy.save_file({"a": torch.ones(1)}, tmp_path / weight_map["a"])
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    result = run("pull", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "model-00002-of-00002.safetensors is missing" in result.stderr


def test_pull_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    assert "--revision" in run("pull", str(tmp_path), "--revision", "main").stderr
    assert "--revision" in run("pull", "demo", "--revision", "main").stderr
    assert "huggingface or modelscope" in run("pull", "a/b", "--source", "ftp").stderr


def test_pull_hands_revision_and_source_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def resolve(name: str, progress: object, revision: str | None) -> Path:
        seen.append((name, revision))
        return tmp_path

    monkeypatch.setattr("nybble.resolve.resolve", resolve)
    run("pull", "a/b", "--revision", "v1")
    run("pull", "a/b", "--source", "modelscope")
    assert seen == [("a/b", "v1"), ("modelscope:a/b", None)]


def test_version() -> None:
    from nybble import __version__

    assert run("--version").stdout == f"nybble {__version__}\n"
