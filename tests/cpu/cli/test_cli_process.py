"""What only a process of its own shows: imports, signals, pipes, terminals."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("chat_program.py")
PATIENCE = 30  # seconds
HEAVY = {"torch", "numpy", "transformers", "huggingface_hub", "tokenizers", "jinja2"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


class Terminal:
    """A program on a pseudo-terminal: what is typed goes in, what it shows comes out."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self._seen = 0
        self._handle, child = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
            # Whoever runs the tests in the background has it ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self._handle, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` was shown after what was waited for last."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.shown[self._seen :]:
            self.shown += self._read(deadline)
        self._seen = self.shown.index(text, self._seen) + len(text)

    def watch(self, seconds: float) -> None:
        """Read what is shown until nothing comes for so long."""
        while select.select([self._handle], [], [], seconds)[0]:
            self.shown += self._read(time.monotonic() + PATIENCE)

    def end(self) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + PATIENCE
        while data := self._read(deadline):
            self.shown += data
        return self._process.wait(timeout=PATIENCE)

    def close(self) -> None:
        """Whatever the test found, leave no process behind."""
        self._process.kill()
        self._process.wait()
        os.close(self._handle)

    def _read(self, deadline: float) -> str:
        ready, _, _ = select.select([self._handle], [], [], deadline - time.monotonic())
        assert ready, f"nothing more is shown after {self.shown!r}"
        try:
            return os.read(self._handle, 4096).decode(errors="replace")
        except OSError:  # what Linux says when the other end is closed
            return ""


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def terminal(open_terminal: Callable[..., Terminal]) -> Terminal:
    program = open_terminal("chat", "demo")
    program.wait_for("> ")
    return program


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.type("x" * 200 + "\n")
    terminal.wait_for("You said xxx")
    terminal.type("\x03")
    terminal.wait_for("Stopped.")
    terminal.type("again\n")
    terminal.wait_for("You said again")
    terminal.wait_for("> ")
    terminal.type("/history\n")
    terminal.wait_for("assistant: You said again")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    kept = re.search(r"assistant: You said (x+)\r\n", terminal.shown)
    assert kept
    assert 3 <= len(kept[1]) < 200


def test_ctrl_c_at_the_prompt_does_not_leave(terminal: Terminal) -> None:
    terminal.type("half a mess")
    terminal.wait_for("half a mess")
    # Python loses a signal that comes just before readline begins to wait for keys.
    while "Ctrl-D or /exit" not in terminal.shown:
        terminal.type("\x03")
        terminal.watch(1)
    terminal.wait_for("Ctrl-D or /exit leaves.")
    terminal.type("hey\n")
    terminal.wait_for("You said hey")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_ctrl_c_ends_a_single_answer_quietly(open_terminal: Callable[..., Terminal]) -> None:
    terminal = open_terminal("chat", "demo", "x" * 200)
    terminal.wait_for("You said xxx")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.shown
    assert "Error" not in terminal.shown


def test_the_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['nybble', 'chat', '--help']\n"
        "from nybble.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted(sys.modules), file=sys.stderr)\n"
    )
    done = python("-c", code)
    assert "--temperature" in done.stdout
    loaded = set(re.findall(r"'(\w+)'", done.stderr))
    assert "nybble" in loaded
    assert not loaded & HEAVY


def test_python_m_is_the_same_command() -> None:
    assert python("-m", "nybble", "--version").stdout.startswith("nybble ")


def test_a_reader_that_leaves_ends_the_answer_silently() -> None:
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "chat", "demo", "x" * 100, "-q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(3) == b"You"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_bug_asks_for_a_report_and_debug_shows_it() -> None:
    code = (
        "import sys, nybble.cli.chat\n"
        "nybble.cli.chat.load = lambda *_: 1 / 0\n"
        "from nybble.cli import main\n"
        "main()\n"
    )
    plain = python("-c", code, "chat", "demo", "hello")
    assert plain.returncode == 1
    assert plain.stderr.startswith("Error: ZeroDivisionError: division by zero. This is a bug")
    assert plain.stderr.count("\n") == 1
    assert "Traceback" in python("-c", code, "--debug", "chat", "demo", "hello").stderr


def test_output_is_utf8_whatever_the_locale() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "chat", "demo", "-", "-q"],
        input="你好".encode(),
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        check=False,
    )
    assert done.stdout.decode() == "You said 你好\n"


@pytest.mark.parametrize(
    ("stream", "says"), [("<&-", "The prompt is empty"), (">&-", ""), ("2>&-", "")]
)
def test_closed_streams(stream: str, says: str) -> None:
    prompt = "-" if stream == "<&-" else "hello"
    done = subprocess.run(
        f'"{sys.executable}" "{PROGRAM}" chat demo {prompt} -q {stream}',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == (1 if says else 0)
    assert says in done.stderr
    assert "bug" not in done.stderr


def test_a_terminal_is_told_that_its_prompt_is_waited_for(
    open_terminal: Callable[..., Terminal],
) -> None:
    terminal = open_terminal("chat", "demo", "-")
    terminal.wait_for("Ctrl-D at the start of a line ends it.")
    terminal.type("hey\n\x04")
    terminal.wait_for("You said hey")
    assert terminal.end() == 0
