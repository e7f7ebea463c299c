"""What reaches the terminal, and what must not."""

from __future__ import annotations

import sys

import pytest

from nybble.cli import console

Captured = pytest.CaptureFixture[str]


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be called in the test itself: pytest changes the streams between a fixture and it."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_an_answer_cannot_steer_the_terminal(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_terminal(monkeypatch)
    console.write("a\x1b[2Jb\x07\x9bc\td\n你好")
    assert capsys.readouterr().out == "a[2Jbc\td\n你好"


def test_elsewhere_an_answer_stays_as_it_is(capsys: Captured) -> None:
    console.write("a\x1b[2Jb")
    assert capsys.readouterr().out == "a\x1b[2Jb"


def test_messages_are_plain_text_on_stderr(capsys: Captured) -> None:
    console.error("no [red]markup[/red] :smile: \x1b[2J " + "long " * 50 + "line")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: no [red]markup[/red] :smile: [2J long")
    assert captured.err.count("\n") == 1


def test_a_bar_for_each_thing_being_done(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_terminal(monkeypatch)
    with console.ProgressBar() as progress:
        progress("Downloading", 1, 4)
        progress("Downloading", 4, 4)
        progress("Loading", 1, 2)
    shown = capsys.readouterr().err
    assert "Downloading" in shown
    assert "Loading" in shown
    assert "50%" in shown


def test_no_bar_where_nobody_sees_it(capsys: Captured) -> None:
    with console.ProgressBar() as progress:
        progress("Loading", 1, 2)
    assert capsys.readouterr().err == ""
