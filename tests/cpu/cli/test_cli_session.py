"""The interactive chat, with a fake model and a fake terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_llm import FakeLLM

from nybble.cli.chat import Chat
from nybble.cli.conversation import Conversation
from nybble.errors import RequestError
from nybble.sampling import SamplingParams

Captured = pytest.CaptureFixture[str]


def session(llm: FakeLLM, *lines: str | type[BaseException], **options: bool) -> Chat:
    """Type `lines` into a session; an exception among them is what reading that line raises."""
    chat = Chat(llm, llm.default_params, Conversation(), **options)  # type: ignore[arg-type]
    chat.session(_reader(lines))
    return chat


def _reader(lines: tuple[str | type[BaseException], ...]) -> Callable[[str], str]:
    rest = iter((*lines, EOFError))

    def read_line(ask: str) -> str:
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    return read_line


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_the_history_goes_with_every_message(capsys: Captured) -> None:
    llm = FakeLLM()
    session(llm, "one", "two")
    assert contents(llm.prompts[0]) == ["one"]
    assert contents(llm.prompts[1]) == ["one", "You said one", "two"]
    assert [m["role"] for m in llm.prompts[1]] == ["user", "assistant", "user"]
    assert capsys.readouterr().out == "You said one\nYou said two\n"


def test_every_answer_has_its_speed_beside_it(capsys: Captured) -> None:
    session(FakeLLM(), "hey")
    line = capsys.readouterr().err
    assert "12 tokens at 10.0/s" in line
    assert "first token after 0.50 s" in line
    session(FakeLLM(), "hey", quiet=True)
    assert "tokens" not in capsys.readouterr().err


def test_clear_forgets_the_turns_and_keeps_the_system_prompt() -> None:
    llm = FakeLLM()
    session(llm, "/system Be brief.", "one", "/clear", "two")
    assert contents(llm.prompts[-1]) == ["Be brief.", "two"]
    assert llm.prompts[-1][0]["role"] == "system"


def test_a_new_system_prompt_starts_a_new_conversation(capsys: Captured) -> None:
    llm = FakeLLM()
    session(llm, "one", "/system Be brief.", "/system", "two")
    assert contents(llm.prompts[-1]) == ["Be brief.", "two"]
    assert "\nBe brief.\n" in capsys.readouterr().err


def test_history_and_help_are_shown(capsys: Captured) -> None:
    session(FakeLLM(), "/history", "one", "/history", "/help")
    shown = capsys.readouterr().err
    assert "Nothing has been said yet." in shown
    assert "user: one\nassistant: You said one\n" in shown
    assert all(command in shown for command in ("/clear", "/system", "/save", "/exit"))


def test_saved_chats_are_openai_messages(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    session(FakeLLM(), "你好", f"/save {path}")
    assert json.loads(path.read_text("utf-8")) == {
        "messages": [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "You said 你好"},
        ]
    }


def test_save_never_overwrites(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "chat.json"
    path.write_text("precious")
    places = (path, "", f"{tmp_path}/no/chat.json", "~nosuchuser/x", "a\0b", "x" * 300)
    chat = session(FakeLLM(), "one", *(f"/save {place}" for place in places))
    assert len(chat.conversation.turns) == 1
    assert path.read_text() == "precious"
    shown = capsys.readouterr().err
    assert "exists already" in shown
    assert "needs a file's name" in shown
    assert shown.count("cannot be written") == 3
    assert "there is no such user" in shown


@pytest.mark.parametrize("leave", ["/exit", "/quit", EOFError])
def test_leaving(leave: str | type[BaseException]) -> None:
    llm = FakeLLM()
    session(llm, "one", leave, "two")
    assert len(llm.prompts) == 1


def test_an_interrupt_while_typing_only_says_how_to_leave(capsys: Captured) -> None:
    llm = FakeLLM()
    session(llm, KeyboardInterrupt, "one")
    assert len(llm.prompts) == 1
    assert "Ctrl-D" in capsys.readouterr().err


def test_an_unknown_command_is_no_message_but_a_path_is(capsys: Captured) -> None:
    llm = FakeLLM()
    session(llm, "/clera", "", "  ", "/etc/hosts: what is it?")
    assert "no command /clera" in capsys.readouterr().err
    assert [contents(prompt) for prompt in llm.prompts] == [["/etc/hosts: what is it?"]]


def test_an_error_is_one_line_and_leaves_the_conversation_as_it_was(capsys: Captured) -> None:
    llm = FakeLLM()
    chat = session(llm, "one", "poison", "two")
    assert "Error: This text is poison: write another.\n" in capsys.readouterr().err
    assert [user for user, _ in chat.conversation.turns] == ["one", "two"]


def test_a_pipe_ends_at_its_first_error() -> None:
    llm = FakeLLM()
    with pytest.raises(RequestError, match="poison"):
        session(llm, "one", "poison", "two", interactive=False)
    assert len(llm.prompts) == 1
    with pytest.raises(RequestError, match="no command /clera"):
        session(llm, "/clera", "two", interactive=False)
    assert len(llm.prompts) == 1


def test_a_pipe_ends_with_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()

    def write(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nybble.cli.console.write", write)
    with pytest.raises(KeyboardInterrupt):
        session(llm, "one", "two", interactive=False)
    assert len(llm.prompts) == 1


def test_a_full_context_drops_the_oldest_turns_and_says_so(capsys: Captured) -> None:
    llm = FakeLLM(max_context=400)
    chat = session(llm, "a" * 60, "b" * 60, "c" * 60)
    assert "the oldest turn was dropped" in capsys.readouterr().err
    assert contents(llm.prompts[-1])[0] == "b" * 60
    assert len(llm.chat_ids(llm.prompts[-1])) <= 300  # a quarter stays free for the answer
    assert len(chat.conversation.turns) == 2


def test_a_message_longer_than_the_context_is_refused(capsys: Captured) -> None:
    llm = FakeLLM(max_context=100)
    session(llm, "x" * 200, "y")
    assert "too long" in capsys.readouterr().err
    assert contents(llm.prompts[-1]) == ["y"]


def test_a_cut_answer_says_why(capsys: Captured) -> None:
    llm = FakeLLM()
    chat = Chat(llm, SamplingParams(max_tokens=5), Conversation())  # type: ignore[arg-type]
    chat.answer("hello")
    captured = capsys.readouterr()
    assert captured.out == "You s\n"
    assert "cut after 5 tokens; --max-tokens" in captured.err


def test_a_stopped_answer_stays_as_far_as_it_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if "".join(shown) == "You said":
            raise KeyboardInterrupt

    monkeypatch.setattr("nybble.cli.console.write", write)
    chat = session(FakeLLM(), "one")
    assert chat.conversation.turns == [("one", "You said")]


def test_what_is_no_utf8_is_refused_by_line(capsys: Captured) -> None:
    llm = FakeLLM()
    session(llm, b"a\xff".decode(errors="surrogateescape"), "fine")
    assert "not UTF-8 at character 1" in capsys.readouterr().err
    assert [contents(prompt) for prompt in llm.prompts] == [["fine"]]
