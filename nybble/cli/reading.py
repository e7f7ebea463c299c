"""What users type or pipe in: lines, blocks, and whole prompts from stdin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from nybble.cli import console
from nybble.errors import RequestError

ReadLine = Callable[[str], str]
"""Called with the text to ask with; raises EOFError at the end of the input."""

_BLOCK = '"""'
ASK, ASK_MORE = "> ", ". "
_LONGEST = 1 << 24  # most characters of a line, bytes of a prompt: no context has room for so many


def read_message(read_line: ReadLine) -> str:
    '''One message: a line; lines that end in a backslash and the next; or a block in """.'''
    line = read_line(ASK)
    if line.lstrip().startswith(_BLOCK):
        return _read_block(line.lstrip().removeprefix(_BLOCK), read_line)
    lines = [line]
    with suppress(EOFError):
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(read_line(ASK_MORE))
    return "\n".join(lines)


def _read_block(line: str, read_line: ReadLine) -> str:
    lines = [line]
    with suppress(EOFError):
        while not lines[-1].rstrip().endswith(_BLOCK):
            lines.append(read_line(ASK_MORE))
    return "\n".join(lines).rstrip().removesuffix(_BLOCK).strip("\n")


def terminal_line(ask: str) -> str:
    """A line of stdin: edited with readline on a terminal, asked for on stderr otherwise."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(ask)
    if sys.stdin.isatty():
        print(ask, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline(_LONGEST + 1)
    if not line:
        raise EOFError
    line = line.removesuffix("\n")
    if len(line) > _LONGEST:
        raise RequestError(f"A line of stdin is longer than {_LONGEST:,} characters: shorten it.")
    return line


def enable_line_editing() -> None:
    """Arrow keys and a history of this session; it is kept in memory only."""
    with suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401


def prompt_text(prompt: str) -> str:
    """A prompt from the command line, or all of stdin for "-", less one newline at its end."""
    text = _read_stdin() if prompt == "-" else checked(prompt)
    if not text:
        raise RequestError("The prompt is empty: give at least one character.")
    return text


def _read_stdin() -> str:
    if sys.stdin.isatty():
        console.note("Type the prompt; Ctrl-D at the start of a line ends it.")
    data = sys.stdin.buffer.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise RequestError(f"stdin is longer than {_LONGEST:,} bytes: shorten the prompt.")
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"stdin is not UTF-8 at byte {error.start}: convert it first, with iconv for example."
        ) from error


def checked(text: str) -> str:
    """`text`, unless it holds bytes that were no UTF-8 when they came in."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text is not UTF-8 at character {error.start}: convert it first, with iconv for "
            "example."
        ) from error
    return text
